"""pocketsphinx in a process of its own; run as a script, which imports nothing of s2quant.

    python -P sphinx_worker.py MODEL

MODEL is an n-gram language model. On stdin come clips, on stdout go transcripts (UTF-8), each as 4 bytes of length,
little-endian, and that many bytes; a clip is 16-bit PCM at 16 kHz. The process ends when stdin does.
"""

from __future__ import annotations

import sys
from typing import IO, Any

RATE_HZ = 16000


def new_decoder(model: str) -> Any:
    """Load pocketsphinx with its English acoustic model.

    Args:
        model: Path of an n-gram language model.

    Returns:
        The decoder.

    Raises:
        ImportError: The package is not installed.
        RuntimeError: The file is no language model.
    """
    import pocketsphinx

    return pocketsphinx.Decoder(lm=model, samprate=RATE_HZ, loglevel="FATAL")


def hear(decoder: Any, pcm: bytes) -> str:
    """Write down a clip, whatever was heard before.

    Args:
        decoder: From `new_decoder`.
        pcm: 16-bit little-endian samples at 16 kHz.

    Returns:
        The transcript.
    """
    # Forget the clip before: the cepstral mean and the noise estimate are carried from one to the next.
    decoder.reinit_feat()
    decoder.start_utt()
    decoder.process_raw(pcm, full_utt=True)
    decoder.end_utt()
    found = decoder.hyp()
    return str(found.hypstr) if found is not None else ""


def send(stream: IO[bytes], data: bytes) -> None:
    """Write a message.

    Args:
        stream: Where to.
        data: What it holds.
    """
    stream.write(len(data).to_bytes(4, "little") + data)
    stream.flush()


def receive(stream: IO[bytes]) -> bytes | None:
    """Read a message.

    Args:
        stream: Where from.

    Returns:
        What it holds, or None at the end of the stream.
    """
    size = stream.read(4)
    if len(size) < 4:
        return None
    length = int.from_bytes(size, "little")
    data = stream.read(length)
    return data if len(data) == length else None


def main(model: str) -> None:
    """Answer clips until there are no more.

    Args:
        model: Path of the language model.
    """
    decoder = new_decoder(model)
    while (pcm := receive(sys.stdin.buffer)) is not None:
        send(sys.stdout.buffer, hear(decoder, pcm).encode("utf-8"))


if __name__ == "__main__":
    main(sys.argv[1])
