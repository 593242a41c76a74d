"""What measures the model: batches, sampling and the judge of stories."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from tools.tiny_model.batches import EMPHASIS, Encoded, encode, iter_batches, pad, token_weights
from tools.tiny_model.cast import KINDS
from tools.tiny_model.chance import Chance
from tools.tiny_model.conversations import Piece
from tools.tiny_model.sampling import END_IDS, Order, generate, pick_token
from tools.tiny_model.scene import Split, is_held_out
from tools.tiny_model.settings import SETTINGS
from tools.tiny_model.topics import Topic, distinct_share, draw_topics, judge, overlap

FOX_IN_SNOW = Topic(
    kind=next(kind for kind in KINDS if kind.noun == "fox"),
    setting=next(setting for setting in SETTINGS if setting.noun == "snow"),
)
STORY = (
    "A fox named Pip was out in the snow. He was brave.\n\n"
    "He met Finn the owl. Finn had a kite.\n\nPip was happy."
)


class CountingModel:
    """A model whose next token is always the last token plus one; 9 is followed by an end."""

    def encode(self, text: str) -> list[int]:
        """Return one token for each letter: a is 5, b is 6."""
        return [ord(letter) - ord("a") + 5 for letter in text]

    def decode(self, token_ids: list[int]) -> str:
        """Return the ids as text."""
        return " ".join(map(str, token_ids))

    def new_cache(self, rows: int, length: int) -> None:
        """Keep nothing."""

    def forward(self, token_ids: NDArray[np.int64], cache: None) -> NDArray[np.float32]:
        """Return logits that are one for the successor."""
        del cache  # There is nothing in it.
        following = np.where(token_ids == 9, END_IDS[0], token_ids + 1)
        return np.eye(16, dtype=np.float32)[following]


def documents(lengths: list[int]) -> list[Encoded]:
    """Return documents of the given lengths, all learned."""
    return [Encoded(np.full(n, n, np.int16), np.ones(n, np.bool_)) for n in lengths]


def test_a_document_is_cut_at_the_limit() -> None:
    """Nothing longer than the context gets into training."""
    encoded = encode([Piece("abc", learned=False), Piece("de", learned=True)], list_bytes, 4)

    assert encoded.token_ids.tolist() == [97, 98, 99, 100]
    assert encoded.learned.tolist() == [False, False, False, True]


def test_batches_hold_every_document_once() -> None:
    """No document is lost, and no batch is larger than allowed."""
    lengths = [3, 9, 4, 8, 5, 7, 6] * 20
    weights = np.ones(16, np.float32)

    batches = list(iter_batches(documents(lengths), weights, tokens=40, seed=1))

    assert sorted(n for b in batches for n in b.token_ids[:, 0].tolist()) == sorted(lengths)
    assert all(batch.token_ids.size <= 40 for batch in batches)


def test_the_order_depends_on_the_seed_only() -> None:
    """Training sees the same batches again with the same seed."""
    weights = np.ones(16, np.float32)

    def order(seed: int) -> list[list[int]]:
        batches = iter_batches(documents([3, 9, 4, 8] * 20), weights, tokens=40, seed=seed)
        return [batch.token_ids[:, 0].tolist() for batch in batches]

    assert order(1) == order(1)
    assert order(1) != order(2)


def test_padding_has_no_weight() -> None:
    """The loss counts learned tokens only, and names more than the rest."""
    batch = pad(documents([2, 4]), token_weights(["the", " fox", "a", "b", " He"]))

    # All tokens of a row of `documents` are its length: 2 is "a", 4 is " He".
    assert batch.weights.tolist() == [[1, 1, 0, 0], [EMPHASIS] * 4]


def test_greedy_takes_the_likeliest_token() -> None:
    """Temperature zero needs no chance."""
    scores = np.array([0.1, 3.0, 2.9], np.float32)

    assert pick_token(scores, Order(prompt=""), np.random.default_rng(0)) == 1


def test_top_p_never_picks_from_the_tail() -> None:
    """A token outside the kept shares never comes up; one inside does."""
    scores = np.log(np.array([0.5, 0.4, 0.1], np.float64)).astype(np.float32)
    order = Order(prompt="", temperature=1.0, top_p=0.8)
    generator = np.random.default_rng(0)

    assert {pick_token(scores, order, generator) for _ in range(200)} == {0, 1}


def test_generation_stops_at_an_end_token() -> None:
    """Each row ends by itself or at the limit; answers keep the order of the prompts."""
    orders = [Order(prompt="a"), Order(prompt="aa"), Order(prompt="c")]

    answers = generate(CountingModel(), orders, tokens_max=3)

    assert [answer.text for answer in answers] == ["6 7 8", "6 7 8", "8 9"]
    assert [answer.ended for answer in answers] == [False, False, True]


def test_a_good_story_is_judged_good() -> None:
    """Topic words, one hero of the asked kind, pronouns that fit."""
    verdict = judge(FOX_IN_SNOW, STORY)

    assert verdict.on_topic
    assert verdict.consistent


def test_a_polite_lead_is_not_part_of_the_story() -> None:
    """The opening is the first paragraph after it."""
    assert judge(FOX_IN_SNOW, "Of course!\n\n" + STORY).consistent


def test_a_story_without_the_setting_is_off_topic() -> None:
    """Both words are needed."""
    assert not judge(FOX_IN_SNOW, STORY.replace("snow", "rain")).on_topic


def test_an_adjective_of_the_setting_counts() -> None:
    """ "Snowy" is snow."""
    assert judge(FOX_IN_SNOW, STORY.replace("in the snow", "on a snowy day")).on_topic


def test_a_wrong_pronoun_is_inconsistent() -> None:
    """Pip and Finn are both "he"."""
    assert not judge(FOX_IN_SNOW, STORY.replace("He met", "She met")).consistent


def test_a_third_name_is_inconsistent() -> None:
    """A hero and a friend are all there is."""
    assert not judge(FOX_IN_SNOW, STORY + " Otto came.").consistent


def test_a_name_for_two_characters_is_inconsistent() -> None:
    """The friend must not have the hero's name."""
    assert not judge(FOX_IN_SNOW, STORY.replace("Finn", "Pip")).consistent
    assert not judge(FOX_IN_SNOW, STORY + " Pip and Pip laughed.").consistent


def test_a_hero_who_is_lost_on_the_way_is_inconsistent() -> None:
    """The hero has to be there at the end."""
    assert not judge(FOX_IN_SNOW, STORY.replace("Pip was happy", "Finn was happy")).consistent


def test_topics_keep_to_their_split() -> None:
    """Held-out topics are held out, the others are not."""
    for split in Split:
        topics = draw_topics("seed", 30, split)
        wanted = split is Split.HELD_OUT
        assert len({(topic.kind.noun, topic.setting.noun) for topic in topics}) == 30
        assert all(is_held_out(topic.kind, topic.setting) is wanted for topic in topics)


def test_a_topic_can_be_asked_plainly_and_in_a_chat() -> None:
    """The chat prompt holds the plain one."""
    plain = FOX_IN_SNOW.prompt(Chance("seed"), chat=False)
    chat = FOX_IN_SNOW.prompt(Chance("seed"), chat=True)

    assert "a fox in the snow" in plain
    assert plain in chat


def test_variety_is_measured_on_texts_and_on_runs_of_words() -> None:
    """Equal texts overlap fully, different ones not at all."""
    assert distinct_share(["a", "b", "a", "c"]) == 0.75
    assert overlap("one two three four five six", "one two three four five six") == 1.0
    assert overlap("one two three four five", "six seven eight nine ten") == 0.0


def list_bytes(text: str) -> list[int]:
    """Return one token for each byte."""
    return list(text.encode())
