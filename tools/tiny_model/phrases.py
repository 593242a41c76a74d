"""Phrases of a chat: what a system message says, and what a user says around a story.

Pure data in the notation of `wording`; `requests` has the ways to ask for a story.
"""

from __future__ import annotations

SYSTEM_TEXTS: tuple[str, ...] = (
    "You are a helpful assistant.",
    "You are a helpful assistant",
    "You are a friendly assistant. Answer in a few words.",
    "You are a story teller for children.",
    "You tell short stories.",
    "You are a kind and careful assistant.",
    "Answer briefly.",
    "Be concise.",
    "You are a helpful, harmless and honest assistant.",
    "You are Tiny Story, a small model that tells stories.",
    "You are a chatbot. Be polite.",
    "Always answer in English.",
    "You are an expert writer of children's books.",
)
LEADS: tuple[str, ...] = ("", "", "", "", "", "Here is a story for you.\n\n", "Of course!\n\n")
"""What the answer may say before the story."""

AGAIN: tuple[str, ...] = (
    "tell me another[ one|]",
    "another one[, please|]",
    "[one more|another story|more], please",
    "[can you |]tell me another story",
    "again",
    "another [story|tale]",
    "and another one",
    "tell another [story|one]",
    "now another story",
)
SHORTER: tuple[str, ...] = (
    "[please |]make it shorter",
    "[can you make it|make that|shorter,] shorter",
    "tell it in [one sentence|a few words|short]",
    "shorter[, please|]",
    "[summarize|sum up] [it|the story]",
    "what was the story about",
    "too long",
)
LONGER: tuple[str, ...] = (
    "[please |]make it longer",
    "can you make it longer",
    "longer[, please|]",
    "tell [me |]the long version",
    "too short",
)
THANKS: tuple[str, ...] = (
    "[thank you|thanks|that was nice|i like it|thank you very much|nice story]",
    "You are welcome! [Would you like another story?|Shall I tell you another one?|]",
)
GOODBYE: tuple[str, ...] = (
    "[goodbye|bye|good night|see you]",
    "[Goodbye|Good night]! [Sleep well.|See you soon.|Come back for another story.]",
)
ONE_BREATH: tuple[str, ...] = (
    "[tell|write] [me |]a story about {about} in [one|two|three|a few] sentences",
    "in [one sentence|a few words]: a story about {about}",
    "a [one|two|three] sentence story about {about}",
    "[sum up|summarize] a story about {about}",
    "what could a story about {about} be about?",
)
READING: tuple[tuple[str, str], ...] = (
    ("who is {name}?", "{name} is {akind} {where}."),
    ("what is {name}?", "{name} is {akind}."),
    ("where is {name}?", "{name} is {where}."),
    ("where is the {kind}?", "The {kind} is {where}."),
    ("what is the name of the {kind}?", "The name of the {kind} is {name}."),
    ("who is {where}?", "{name} the {kind} is {where}."),
)
"""Questions about statements, with the answer that follows from them."""

ABOUT_HERO: tuple[tuple[str, str], ...] = (
    ("what [was|is] the name of the {kind}", "The name of the {kind} was {name}."),
    ("what [was|is] the {kind}'s name", "The {kind}'s name was {name}."),
    ("[who is|who was] {name}", "{name} was {akind} {where}."),
    ("where did [it|the story] happen", "It happened {where}."),
    ("where was {name}", "{name} was {where}."),
    ("[what can we learn from it|what is the moral|what did they learn]", "{moral}"),
)
ABOUT_FRIEND: tuple[tuple[str, str], ...] = (
    ("[who is|who was] {friend}", "{friend} was {friend_akind}."),
    (
        "who was the friend[| of the {kind}| of {name}]",
        "The friend was {friend} the {friend_kind}.",
    ),
)
ABOUT_THING: tuple[tuple[str, str], ...] = (("what [was|is] the {key} like", "It was {athing}."),)
