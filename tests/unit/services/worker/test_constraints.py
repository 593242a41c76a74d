from __future__ import annotations

import json
import time
from collections.abc import Callable

import pytest
from jsonschema import Draft202012Validator
from maas.inference.v1 import constraint_pb2, tools_pb2

from libs.errors import FieldRule, InvalidArgument, Reason
from services.worker.constraints import compile_constraint
from services.worker.engine.base import Constraint, ConstraintKind
from services.worker.parsing import CallPiece, OutputParser, Piece, TextPiece, ToolFormat
from tests.unit.services.worker.byte_walks import accepts, begins, random_output
from tools.conformance.schemas import generate_schema

OutputConstraint = constraint_pb2.OutputConstraint
POINT = json.dumps(
    {
        "type": "object",
        "properties": {"x": {"type": "integer", "minimum": 0, "maximum": 99}},
        "required": ["x"],
        "additionalProperties": False,
    }
)


def compiled(constraint: constraint_pb2.OutputConstraint) -> Constraint:
    made = compile_constraint(constraint, None, tool_format=None)
    assert made is not None
    return made


def refusal(action: Callable[[], object]) -> InvalidArgument:
    with pytest.raises(InvalidArgument) as caught:
        action()
    return caught.value


@pytest.mark.parametrize("seed", range(100))
def test_every_random_output_matches_its_schema(seed: int) -> None:
    generated = generate_schema(seed)
    constraint = compiled(OutputConstraint(json_schema=generated.text))
    validator = Draft202012Validator(generated.schema)

    for walk in range(3):
        output = random_output(constraint.grammar, seed * 10 + walk)
        assert list(validator.iter_errors(json.loads(output))) == []
        assert len(output) <= generated.characters_max


def test_json_is_compact() -> None:
    constraint = compiled(OutputConstraint(json_schema=POINT))

    assert constraint.kind is ConstraintKind.JSON_SCHEMA
    assert constraint.source == POINT
    assert accepts(constraint.grammar, '{"x":7}')
    assert not begins(constraint.grammar, '{"x": 7}')
    assert not begins(constraint.grammar, '{"x":100}')


def test_a_json_object_is_any_object() -> None:
    constraint = compiled(OutputConstraint(json_object=constraint_pb2.JsonObject()))

    assert constraint.kind is ConstraintKind.JSON_OBJECT
    assert accepts(constraint.grammar, '{"a":[1,{"b":null}],"c":"é\\n"}')
    assert not begins(constraint.grammar, "[")


def test_a_schema_that_allows_all_gives_json() -> None:
    constraint = compiled(OutputConstraint(json_schema="true"))

    assert accepts(constraint.grammar, "[1,null]")
    assert not begins(constraint.grammar, "x")


def test_a_regular_expression_matches_the_whole() -> None:
    constraint = compiled(OutputConstraint(regex="(yes|no)/[0-9]{2}\n?"))

    assert constraint.kind is ConstraintKind.REGEX
    assert accepts(constraint.grammar, "yes/12")
    assert accepts(constraint.grammar, "no/34\n")
    assert not accepts(constraint.grammar, "yes/1")
    assert not begins(constraint.grammar, "xyes")


def test_a_grammar_is_enforced() -> None:
    constraint = compiled(OutputConstraint(grammar='root ::= "a"+ b\nb ::= "b" | "c"'))

    assert constraint.kind is ConstraintKind.GRAMMAR
    assert accepts(constraint.grammar, "aaac")
    assert not accepts(constraint.grammar, "aa")


@pytest.mark.parametrize(
    "values", [["yes", "no"], ["a", "ab", "abc"], ['x"\n\\ü€😀\x00\x7f', "/", "[a]*"], ["\n", " "]]
)
def test_choices_allow_just_these_texts(values: list[str]) -> None:
    constraint = compiled(OutputConstraint(choices=constraint_pb2.Choices(values=values)))

    assert constraint.kind is ConstraintKind.CHOICES
    assert json.loads(constraint.source) == values
    assert [value for value in values if not accepts(constraint.grammar, value)] == []
    assert not accepts(constraint.grammar, values[0] + values[0])
    assert not accepts(constraint.grammar, "")
    assert {random_output(constraint.grammar, seed) for seed in range(40)} == set(values)


def test_the_same_constraint_is_compiled_once() -> None:
    first = compiled(OutputConstraint(regex="cached{3}"))

    assert compiled(OutputConstraint(regex="cached{3}")) is first


LONG_CHOICES = [f"{number:03}" * 1000 for number in range(99)]


@pytest.mark.parametrize(
    ("constraint", "field"),
    [
        (OutputConstraint(json_schema='{"type": 3}'), "json_schema"),
        (OutputConstraint(json_schema='{"not": {}}'), "json_schema"),
        (OutputConstraint(json_schema='{"enum": []}'), "json_schema"),
        (OutputConstraint(json_schema='{"const": 1, "type": "string"}'), "json_schema"),
        (OutputConstraint(json_schema='{"const": "\\ud800"}'), "json_schema"),
        (OutputConstraint(json_schema='{"const": 1e999}'), "json_schema"),
        (OutputConstraint(regex="(a"), "regex"),
        (OutputConstraint(regex="(?=a)b"), "regex"),
        (OutputConstraint(regex=r"(a)\1"), "regex"),
        (OutputConstraint(regex="[^\\x00-\\U0010FFFF]"), "regex"),
        (OutputConstraint(grammar="root ::= x"), "grammar"),
        (OutputConstraint(choices=constraint_pb2.Choices()), "choices.values"),
        (OutputConstraint(choices=constraint_pb2.Choices(values=["a", ""])), "choices.values[1]"),
        (
            OutputConstraint(choices=constraint_pb2.Choices(values=["a", "b", "c", "b"])),
            "choices.values[3]",
        ),
        (
            OutputConstraint(choices=constraint_pb2.Choices(values=LONG_CHOICES)),
            "choices.values",
        ),
    ],
)
def test_a_bad_constraint_is_refused_with_its_field(
    constraint: constraint_pb2.OutputConstraint, field: str
) -> None:
    error = refusal(lambda: compiled(constraint))

    assert error.reason is Reason.BAD_OUTPUT_CONSTRAINT
    assert error.metadata == {"field": f"spec.constraint.{field}"}
    assert [violation.field for violation in error.violations] == [f"spec.constraint.{field}"]
    assert len(error.message) < 300


BOMBS = {
    "counted repetitions": OutputConstraint(regex="(a{1000}){1000}"),
    "optional characters": OutputConstraint(regex="a?" * 8000),
    "groups": OutputConstraint(regex="(" * 8000),
    "nested schema": OutputConstraint(json_schema='{"not":' * 9000 + "{}" + "}" * 9000),
    "brackets": OutputConstraint(json_schema="[" * 65_000),
    "many subschemas": OutputConstraint(json_schema=json.dumps({"anyOf": [{}] * 15_000})),
    "many required": OutputConstraint(
        json_schema=json.dumps({"required": [str(number) for number in range(8000)]})
    ),
    "remainders": OutputConstraint(json_schema='{"type": "integer", "multipleOf": 1000003}'),
    "pattern": OutputConstraint(json_schema='{"type": "string", "pattern": "((a{99}){99}){99}"}'),
    "endless": OutputConstraint(json_schema='{"$ref": "#"}'),
    "product of alternatives": OutputConstraint(
        json_schema=json.dumps(
            {
                "allOf": [
                    {"anyOf": [{"type": "string", "maxLength": i * 10 + j} for j in range(6)]}
                    for i in range(12)
                ]
            }
        )
    ),
    "optional parts": OutputConstraint(grammar="root ::= " + '"a"? ' * 12_000),
    "doubling rules": OutputConstraint(
        grammar="root ::= r0 r0\n"
        + "\n".join(f"r{n} ::= r{n + 1} r{n + 1}" for n in range(40))
        + '\nr40 ::= "x"'
    ),
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_is_refused_fast(name: str) -> None:
    began = time.process_time()

    error = refusal(lambda: compiled(BOMBS[name]))

    assert error.reason is Reason.BAD_OUTPUT_CONSTRAINT
    # 1 ms to 90 ms on a free core; without the bounds seconds to hours.
    assert time.process_time() - began < 1


def tools_of(
    *tools: tools_pb2.Tool,
    mode: tools_pb2.ToolMode.ValueType = tools_pb2.TOOL_MODE_REQUIRED,
    required_tool: str = "",
    parallel: bool | None = None,
) -> tools_pb2.ToolOptions:
    return tools_pb2.ToolOptions(
        tools=tools, mode=mode, required_tool=required_tool, parallel_calls=parallel
    )


def tool(name: str, schema: str = "", *, strict: bool = False) -> tools_pb2.Tool:
    return tools_pb2.Tool(name=name, parameters_json_schema=schema, strict=strict)


def grammar_of(tools: tools_pb2.ToolOptions, tool_format: ToolFormat = ToolFormat.HERMES) -> str:
    made = compile_constraint(None, tools, tool_format=tool_format)
    assert made is not None
    assert made.kind is ConstraintKind.TOOLS
    return made.grammar


def parsed(tool_format: ToolFormat, text: str, names: set[str]) -> list[Piece]:
    parser = OutputParser(
        tools=tool_format,
        tool_names=names,
        parallel=True,
        reasoning=None,
        starts_in_reasoning=False,
        new_call_id=str,
    )
    return [*parser.push(text), *parser.finish()]


BOUNDED = json.dumps(
    {
        "type": "object",
        "properties": {"at": {"enum": ["</tool_call>", "]", "}"]}, "n": {"type": "boolean"}},
        "required": ["at"],
        "additionalProperties": False,
    }
)
EMPTY = json.dumps({"type": "object", "additionalProperties": False})


@pytest.mark.parametrize("parallel", [True, False])
@pytest.mark.parametrize("tool_format", ToolFormat)
def test_a_required_call_is_all_that_comes_and_is_valid(
    tool_format: ToolFormat, *, parallel: bool
) -> None:
    tools = tools_of(tool("look", BOUNDED), tool("now", EMPTY), parallel=parallel)
    grammar = grammar_of(tools, tool_format)
    counts = set()

    for seed in range(30):
        pieces = parsed(tool_format, random_output(grammar, seed), {"look", "now"})
        calls = [piece for piece in pieces if isinstance(piece, CallPiece)]
        assert calls == pieces
        schemas = {"look": json.loads(BOUNDED), "now": json.loads(EMPTY)}
        for call in calls:
            validator = Draft202012Validator(schemas[call.name])
            assert validator.is_valid(json.loads(call.arguments))
        counts.add(len(calls))

    assert (max(counts) > 1) is parallel
    assert min(counts) == 1
    assert max(counts) <= 8


def test_a_tool_without_a_schema_takes_any_object() -> None:
    grammar = grammar_of(tools_of(tool("f")))

    assert accepts(grammar, '<tool_call>\n{"name": "f", "arguments": {"a":[1]}}\n</tool_call>')
    assert not begins(grammar, '<tool_call>\n{"name": "f", "arguments": [')


def test_only_the_required_tool_may_be_called() -> None:
    grammar = grammar_of(tools_of(tool("f"), tool("g"), required_tool="g"))

    assert begins(grammar, '<tool_call>\n{"name": "g"')
    assert not begins(grammar, '<tool_call>\n{"name": "f"')


@pytest.mark.parametrize(
    ("tool_format", "good", "bad"),
    [
        (
            ToolFormat.HERMES,
            'Hi\n<tool_call>\n{"name": "f", "arguments": {"x":7}}\n</tool_call>',
            'Hi\n<tool_call>\n{"name": "f", "arguments": {"y"',
        ),
        (
            ToolFormat.LLAMA3,
            '{"name": "f", "parameters": {"x":7}}',
            '{"name": "f", "parameters": {"y"',
        ),
        (
            ToolFormat.LLAMA3,
            'Hi <|python_tag|>{"name": "f", "parameters": {"x":7}}',
            "Hi <|python_tag|>[",
        ),
        (
            ToolFormat.MISTRAL,
            'Hi [TOOL_CALLS] [{"name": "f", "arguments": {"x":7}}]',
            'Hi [TOOL_CALLS] [{"name": "h"',
        ),
    ],
)
def test_a_strict_call_in_free_text_has_to_be_valid(
    tool_format: ToolFormat, good: str, bad: str
) -> None:
    for parallel in (True, False):
        tools = tools_of(
            tool("f", POINT, strict=True),
            tool("g"),
            mode=tools_pb2.TOOL_MODE_AUTO,
            parallel=parallel,
        )
        grammar = grammar_of(tools, tool_format)

        assert accepts(grammar, "Just text, 1 < 2 [and] more.\n<tool")
        assert accepts(grammar, good)
        assert not begins(grammar, bad)
        assert parsed(tool_format, good, {"f"})[-1:] == [CallPiece(0, "0", "f", '{"x":7}')]


def test_text_goes_on_behind_a_strict_call_where_several_are_allowed() -> None:
    call = '<tool_call>\n{"name": "f", "arguments": {"x":7}}\n</tool_call>'
    several = tools_of(tool("f", POINT, strict=True), mode=tools_pb2.TOOL_MODE_AUTO)
    one = tools_of(tool("f", POINT, strict=True), mode=tools_pb2.TOOL_MODE_AUTO, parallel=False)

    assert accepts(grammar_of(several), f"{call}\n{call} and text")
    assert accepts(grammar_of(one), call)
    assert not begins(grammar_of(one), f"{call}\n")
    assert parsed(ToolFormat.HERMES, f"{call} ok", {"f"})[-1] == TextPiece("ok")


@pytest.mark.parametrize(
    "tools",
    [
        tools_of(tool("f", POINT), mode=tools_pb2.TOOL_MODE_AUTO),
        tools_of(tool("f", POINT), mode=tools_pb2.TOOL_MODE_UNSPECIFIED),
        tools_of(tool("f", POINT, strict=True), mode=tools_pb2.TOOL_MODE_NONE),
        None,
    ],
)
def test_free_tools_constrain_nothing_and_leave_a_constraint_as_it_is(
    tools: tools_pb2.ToolOptions | None,
) -> None:
    assert compile_constraint(None, tools, tool_format=ToolFormat.HERMES) is None
    assert compile_constraint(OutputConstraint(), tools, tool_format=ToolFormat.HERMES) is None

    constraint = OutputConstraint(regex="a|b")
    both = compile_constraint(constraint, tools, tool_format=ToolFormat.HERMES)
    assert both == compiled(constraint)


@pytest.mark.parametrize(
    "tools",
    [tools_of(tool("f")), tools_of(tool("f", strict=True), mode=tools_pb2.TOOL_MODE_AUTO)],
)
def test_enforced_tools_and_a_constraint_contradict_each_other(
    tools: tools_pb2.ToolOptions,
) -> None:
    error = refusal(
        lambda: compile_constraint(
            OutputConstraint(regex="a"), tools, tool_format=ToolFormat.HERMES
        )
    )

    assert error.reason is Reason.INVALID_FIELD
    assert [(found.field, found.rule) for found in error.violations] == [
        ("spec.constraint", FieldRule.CONFLICTING)
    ]


@pytest.mark.parametrize(
    ("tools", "reason", "field"),
    [
        (
            tools_of(tool("f"), tool("g"), tool("h", '{"type": 3}')),
            Reason.BAD_OUTPUT_CONSTRAINT,
            "tools[2].parameters_json_schema",
        ),
        (
            tools_of(tool("f", '{"type": "array"}')),
            Reason.BAD_OUTPUT_CONSTRAINT,
            "tools[0].parameters_json_schema",
        ),
        (
            tools_of(tool("f", '{"properties": {"a": {"uniqueItems": true}}}')),
            Reason.BAD_OUTPUT_CONSTRAINT,
            "tools[0].parameters_json_schema",
        ),
        (
            tools_of(*(tool(f"t{n}", json.dumps({"anyOf": [{}] * 400})) for n in range(3))),
            Reason.BAD_OUTPUT_CONSTRAINT,
            "tools[2].parameters_json_schema",
        ),
        (tools_of(tool("f"), tool("f")), Reason.INVALID_FIELD, "tools[1].name"),
        (tools_of(tool("f"), required_tool="g"), Reason.INVALID_FIELD, "required_tool"),
        (tools_of(), Reason.INVALID_FIELD, "tools"),
    ],
)
def test_bad_tools_are_refused_with_their_field(
    tools: tools_pb2.ToolOptions, reason: Reason, field: str
) -> None:
    error = refusal(lambda: grammar_of(tools))

    assert error.reason is reason
    assert [violation.field for violation in error.violations] == [f"spec.tools.{field}"]


def test_tools_of_a_model_without_a_format_cannot_be_enforced() -> None:
    error = refusal(lambda: compile_constraint(None, tools_of(tool("f")), tool_format=None))

    assert error.reason is Reason.FEATURE_UNSUPPORTED
    assert [found.field for found in error.violations] == ["spec.tools"]
