"""A suite: what the evaluation says, hears and asks for.

A suite is a YAML file in `eval/suites`, data that can be read, diffed and shared; its schema stands in
`eval/README.md`. Its texts are a JSONL file pinned by sha256, or a list in the format of seed-tts-eval of which the
user has a copy. Everything that can move a number stands in it: texts, voices, seeds, sampling, recognizer,
normalizer, similarity back end, margins, gates. Unknown keys, values out of range, files that are absent or are not
those that were pinned, and contradictions are refused; every offender is named in one message.
"""

from s2quant.suite.schema import (
    ASR_KINDS,
    FAIL_ON,
    GATES,
    MARGINS,
    METRICS,
    NORMALIZER_LANGUAGES,
    NORMALIZERS,
    SIMILARITY_KINDS,
    Suite,
    load_suite,
)
from s2quant.suite.texts import Utterance, Voice, read_seed_tts_list

__all__ = [
    "ASR_KINDS",
    "FAIL_ON",
    "GATES",
    "MARGINS",
    "METRICS",
    "NORMALIZERS",
    "NORMALIZER_LANGUAGES",
    "SIMILARITY_KINDS",
    "Suite",
    "Utterance",
    "Voice",
    "load_suite",
    "read_seed_tts_list",
]
