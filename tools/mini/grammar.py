"""Sentences of three to twelve common English words, from templates of our own; the split into train and test.

A sentence belongs to a split by a hash of its words, so no list has to be kept and no sentence is in two splits.
Words that sound like another word (blue, read, two) are left out: a recognizer could not tell them apart.
Inline tags stand in the text as the model reads it; `spoken` takes them out again.
"""

from __future__ import annotations

import hashlib
import itertools
import random
import re
from collections.abc import Iterator
from typing import Literal

Split = Literal["train", "validation", "test"]
MIN_WORDS, MAX_WORDS = 3, 12
TAGS = ("fast", "slow", "high", "low", "pause")

# Words that may stand for one another; what is joined by _ is several words.
_WORDS = """\
name: Anna Peter Robert Emma Henry Alice David Linda Oscar Martin Susan Victor
person: teacher doctor farmer sailor painter woman driver baker captain friend neighbor sister brother mother
person: father student singer lawyer dancer gardener hunter soldier uncle cousin visitor worker pilot
person: carpenter stranger tailor cook judge
animal: horse rabbit kitten dog monkey tiger spider chicken turtle dolphin
mood: old young happy tired clever quiet friendly hungry angry careful famous lonely proud gentle brave lazy
mood: polite nervous honest curious
thing: letter basket window door book picture lamp table bottle camera ticket hammer blanket bicycle guitar
thing: candle carpet mirror box pencil jacket ladder umbrella apple cake kettle newspaper orange pillow bucket
thing: clock telephone sandwich banana package piano shovel engine wallet helmet
look: small large heavy wooden yellow green purple broken golden silver narrow round dusty expensive beautiful
look: empty simple strange modern perfect dirty orange cheap warm
place: garden river church station bridge mountain street library lake village kitchen beach market forest
place: castle harbor school hospital factory island airport office valley theater restaurant museum
where: in near behind under beside outside inside across from beyond
time: yesterday this_morning last_summer every_evening after_dinner before_breakfast on_Monday in_the_winter
time: at_midnight in_April last_Friday once_again in_November after_lunch on_Saturday every_afternoon
time: in_the_spring last_October
did: opened carried painted repaired found lost dropped followed watched cleaned borrowed covered forgot
did: wanted touched pulled pushed moved ordered finished washed kicked lifted remembered loved visited noticed
did: protected recognized measured
do: open carry paint repair find lose drop follow watch clean borrow cover forget want touch pull push move
do: order finish wash kick lift remember love visit notice protect recognize measure
went: walked slept waited laughed danced worked stayed listened traveled smiled rested arrived jumped sang
went: shouted disappeared whispered studied
go: walk sleep wait laugh dance work stay listen travel smile rest arrive jump sing shout disappear whisper
go: study
how: slowly quickly carefully together alone happily suddenly silently gladly politely calmly already twice
how: outside everywhere forever
may: can should must might could cannot will
who: she he they we nobody everybody somebody
group: children people girls boys parents doctors farmers workers students visitors dogs birds
stuff: water coffee bread butter sugar music paper money soup honey cotton pepper fruit milk
sky: cold windy sunny cloudy rainy dark stormy pleasant terrible wonderful foggy
than: larger smaller older heavier cheaper stronger better darker longer faster
count: three five six seven nine ten eleven twelve twenty thirty hundred
things: letters baskets windows books pictures bottles tickets candles mirrors pencils apples bananas
event: concert meeting wedding game party lesson holiday journey
state: ready empty broken open closed finished missing hidden full wet
"""


def _read_words(text: str) -> dict[str, list[str]]:
    table: dict[str, list[str]] = {}
    for key, words in (line.split(":") for line in text.splitlines()):
        table.setdefault(key, []).extend(word.replace("_", " ") for word in words.split())
    return table


WORDS = _read_words(_WORDS)
PHRASES: dict[str, list[str]] = {
    "subject": [
        "the {person}",
        "the {mood} {person}",
        "the {mood} {person}",
        "{name}",
        "the {mood} {animal}",
        "my {person}",
        "our {person}",
        "the {person} and the {person}",
    ],
    "object": [
        "the {thing}",
        "the {look} {thing}",
        "a {plain} {thing}",
        "the {look} {thing}",
        "his {thing}",
        "my {look} {thing}",
        "{count} {things}",
        "some {stuff}",
        "the {stuff}",
    ],
    "at": ["{where} the {place}", "at the {place}", "{where} the {plain} {place}"],
    "plain": [
        "small",
        "large",
        "heavy",
        "wooden",
        "yellow",
        "green",
        "broken",
        "narrow",
        "round",
        "dusty",
        "simple",
        "modern",
    ],
}
TEMPLATES = """\
{subject} {did} {object}.
{subject} {did} {object}.
{subject} {did} {object} {at}.
{subject} {did} {object} {at}.
{subject} {did} {object} {time}.
{subject} {did} {object} {at} {time}.
{subject} {went} {how}.
{subject} {went} {at}.
{subject} {went} {how} {at}.
{subject} {went} {at} {time}.
{time}, {subject} {did} {object}.
{time}, {subject} {went} {how} {at}.
{who} {did} {object} {at}.
{who} {did} {object} {time}.
{who} {may} {do} {object} {how}.
{subject} {may} {do} {object}.
{subject} {may} {do} {object} {time}.
{who} {may} {go} {at}.
please {do} {object} {time}.
please {do} {object}, {name}.
do not {do} {object} {at}.
do not {go} {at}, {name}.
{do} {object} and {go} {at}.
did {subject} {do} {object}?
did {name} {do} {object} {at}?
where is {object}?
where did {subject} {do} {object}?
why did {subject} {go} {at}?
who {did} {object} {at}?
who {went} {at} {time}?
the weather in the {place} was {sky} and {sky}.
it was {sky} {at} {time}.
the {look} {thing} is {than} than the {place}.
my {thing} is {than} than {object}.
the {place} is {state}, but the {place} is {state}.
{object} {at} is {state}.
{count} {group} {went} {at}.
{count} {group} {did} {object} {time}.
the {group} {went} {how} after the {event}.
during the {event}, {subject} {did} {object}.
I think that {subject} {did} {object}.
I want to {do} {object} {time}.
we will {go} {at} {time}.
she said that the {event} was {sky}.
when the {event} ended, {subject} {went} {how}.
if you {do} {object}, {who} will {go}.
{name} and {name} {did} {object} {at}.
{name}, {do} {object}.
good evening, {name}.
thank you very much, {name}.
the {animal} {went} {at} while {subject} {did} {object}.
nobody {did} {object} because the {thing} was {state}.
{subject} likes {stuff} and {stuff}.
there is {stuff} in the {look} {thing}.
there are {count} {things} {at}.
""".splitlines()


def _expand(text: str, rng: random.Random) -> str:
    """Fill the slots from the left; a word or a place comes once in a sentence."""
    used: set[str] = set()
    while match := re.search(r"\{(\w+)\}", text):
        key = match[1]
        choice = rng.choice(PHRASES.get(key) or [word for word in WORDS[key] if word not in used])
        used.add(choice)
        text = text[: match.start()] + choice + text[match.end() :]
    return text


def words_of(text: str) -> list[str]:
    """The words of a text in lower case, without tags, speaker marks and punctuation."""
    return re.findall(r"[a-z]+", spoken(text).lower())


def spoken(text: str) -> str:
    """What is heard of a text: no tags, no speaker marks."""
    text = re.sub(r"<\|speaker:\d+\|>|\[[^\[\]]*\]", " ", text)
    return re.sub(r" (?=[.,?])", "", " ".join(text.split()))


def split_of(text: str) -> Split:
    """Tell by its words which split a sentence belongs to: 3 % test, 3 % validation."""
    bucket = int.from_bytes(hashlib.sha256(" ".join(words_of(text)).encode()).digest()[:4], "big") % 100
    return "test" if bucket < 3 else "validation" if bucket < 6 else "train"


def sentences(seed: int, split: Split) -> Iterator[str]:
    """Give distinct sentences of one split, without end."""
    rng, seen = random.Random(f"grammar {seed}"), set()
    while True:
        text = _expand(rng.choice(TEMPLATES), rng)
        key = tuple(words_of(text))
        repeated = any(a == b for a, b in itertools.pairwise(key))
        if repeated or not MIN_WORDS <= len(key) <= MAX_WORDS or split_of(text) != split or key in seen:
            continue
        seen.add(key)
        yield text[0].upper() + text[1:]


def vocabulary() -> list[str]:
    """All words that sentences can hold, in lower case, sorted."""
    texts = [*TEMPLATES, *(item for table in (WORDS, PHRASES) for items in table.values() for item in items)]
    return sorted({word for text in texts for word in re.findall(r"[a-z]+", re.sub(r"\{\w+\}", " ", text).lower())})


def with_tags(sentence: str, rng: random.Random) -> str:
    """Put tags into a sentence: of rate, of pitch, or a pause between two words."""
    kind = rng.choice(("rate", "rate", "pitch", "pitch", "pause", "rate pitch", "rate pause"))
    words = sentence.split()
    if "pause" in kind:
        words.insert(rng.randrange(1, len(words)), "[pause]")
    if "pitch" in kind:
        words.insert(0, rng.choice(("[high]", "[low]")))
    if "rate" in kind:
        words.insert(0, rng.choice(("[fast]", "[slow]")))
    return " ".join(words)
