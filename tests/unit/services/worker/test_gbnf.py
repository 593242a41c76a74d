from __future__ import annotations

import time

import pytest
from llguidance import LLMatcher
from llguidance.gbnf_to_lark import gbnf_to_lark

from services.worker.gbnf import GrammarInvalid, lark_literal, to_lark
from tests.unit.services.worker.byte_walks import accepts, begins

ARITHMETIC = r"""
# from llama.cpp's examples
root  ::= (expr "=" ws term "\n")+
expr  ::= term ([-+*/] term)*
term  ::= ident | num | "(" ws expr ")" ws
ident ::= [a-z] [a-z0-9_]* ws
num   ::= [0-9]+ ws
ws    ::= [ \t\n]*
"""
JSON = r"""
root ::= object
value ::= object | array | string | number | ("true" | "false" | "null") ws
object ::= "{" ws ( string ":" ws value ("," ws string ":" ws value)* )? "}" ws
array ::= "[" ws ( value ("," ws value)* )? "]" ws
string ::= "\"" ( [^"\\\x7F\x00-\x1F] | "\\" (["\\bfnrt] | "u" [0-9a-fA-F]{4}) )* "\"" ws
number ::= ("-"? ([0-9] | [1-9] [0-9]{0,15})) ("." [0-9]+)? ([eE] [-+]? [0-9] [1-9]{0,15})? ws
ws ::= | " " | "\n" [ \t]{0,20}
"""


def compiled(source: str) -> str:
    return LLMatcher.grammar_from_lark(to_lark(source))


@pytest.mark.parametrize(
    ("source", "matching", "other"),
    [
        (ARITHMETIC, ["a=1\n", "(a*b)=4\n", "x_1+2=3\ny=z \n\n"], ["a=", "1=1", "=1\n", "A=1\n"]),
        (JSON, ["{}", '{"a": [1,2.5e3,{"b":"\\u00e9"}]}'], ['{"a":}', "[1]", '{"a":"x\ny"}']),
        ('root ::= "ja" | "nein" |\n  "€ * {2}" [.] .', ["ja", "€ * {2}.\n"], ["j", "€ * {2}x."]),
        ('root ::= a{2,3} ("x" | )\na ::= b? "c"\nb ::= "b"', ["cc", "bccx"], ["c", "cccc"]),
        (r'root ::= "\x41\u00e9\U0001F600" [^\]a-c-]', ["Aé😀d"], ["Aé😀b", "Aé😀]", "Aé😀-"]),
        ('root::=(\n"a"\n|"b"\n)# end\n\n', ["a", "b"], ["ab"]),
    ],
)
def test_a_grammar_matches_what_it_says(source: str, matching: list[str], other: list[str]) -> None:
    grammar = compiled(source)

    assert [text for text in matching if not accepts(grammar, text)] == []
    assert [text for text in other if accepts(grammar, text)] == []


@pytest.mark.parametrize("text", ['{"a":[true,{"b":"\\n"}]}', "{}", '{"a"', '{"a":tru', "{x"])
def test_it_agrees_with_the_converter_of_llguidance(text: str) -> None:
    theirs = LLMatcher.grammar_from_lark(gbnf_to_lark(JSON))

    assert begins(compiled(JSON), text) == begins(theirs, text)


@pytest.mark.parametrize("text", ["a", 'say "x"', "a/b\\c", "\n\t\x00\x7f", "ü€😀", "[a-z]{2}"])
def test_a_literal_matches_just_its_text(text: str) -> None:
    grammar = LLMatcher.grammar_from_lark(f"start: {lark_literal(text)}\n")

    assert accepts(grammar, text)
    assert not accepts(grammar, text + "a")
    assert not begins(grammar, "b")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("", "no rule root"),
        ('x ::= "a"', "no rule root"),
        ("root ::= a", "rule a is not there"),
        ("root ::=", "rule root is empty"),
        ('root ::= "a" root', "no text matches"),
        ("root ::= a b\nb ::= a\na ::= b", "no text matches"),
        ('root ::= "a"\nroot ::= "b"', "twice"),
        ("root ::= (", "not closed"),
        ('root ::= "a")', "not opened"),
        ('root ::= "a', "line 1"),
        ('root ::= "a"\n\nx ::= [', "line 3"),
        ("root ::= []", "empty"),
        ("root ::= [z-a]", "below"),
        ('root ::= "a"{3,2}', "below"),
        ("root ::= *", "nothing to repeat"),
        ('root ::= "a"**', "nothing to repeat"),
        (r'root ::= "\q"', "escape"),
        (r'root ::= "\uD800"', "escape"),
        ('"a" ::= "b"', "begin"),
    ],
)
def test_what_is_no_grammar_is_refused(source: str, message: str) -> None:
    with pytest.raises(GrammarInvalid, match=message):
        to_lark(source)


@pytest.mark.parametrize(
    "source",
    [
        "root ::= " + "(" * 30_000,
        'root ::= ("a"{1000}){1000}',
        "root ::= " + '"a"? ' * 13_000,
        "root ::= " + " | ".join(f'"l{number}"' for number in range(8000)),
        "root ::= " + '"a"{9999999}',
        "\n".join(f'r{number} ::= "a"' for number in range(4000)),
    ],
    ids=["nesting", "product", "optional", "alternatives", "count", "rules"],
)
def test_a_bomb_is_refused_at_once(source: str) -> None:
    began = time.perf_counter()

    with pytest.raises(GrammarInvalid):
        to_lark(source)

    # 50 ms alone on a core.
    assert time.perf_counter() - began < 1
