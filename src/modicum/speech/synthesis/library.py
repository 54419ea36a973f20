"""libespeak-ng, called through ctypes. Imports nothing but the standard library.

The structures are those of espeak-ng/speak_lib.h, version 1.51, which has kept them since version 1.49.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import os
from dataclasses import dataclass
from typing import Any

_SYNCHRONOUS = 2  # AUDIO_OUTPUT_SYNCHRONOUS
_PHONE_EVENTS, _IPA, _DONT_EXIT = 1, 2, 0x8000  # espeakINITIALIZE_…
_RATE, _PITCH = 1, 3  # espeakRATE, espeakPITCH
_UTF8, _END_PAUSE = 1, 0x1000  # espeakCHARS_UTF8, espeakENDPAUSE
_PHONE = 7  # espeakEVENT_PHONEME
_NAME_BYTES = 8


class _Identity(ctypes.Union):
    _fields_ = (
        ("number", ctypes.c_int),
        ("name", ctypes.c_char_p),
        ("string", ctypes.c_ubyte * _NAME_BYTES),
    )


class _Event(ctypes.Structure):
    _fields_ = (
        ("type", ctypes.c_int),
        ("unique_identifier", ctypes.c_uint),
        ("text_position", ctypes.c_int),
        ("length", ctypes.c_int),
        ("audio_position", ctypes.c_int),
        ("sample", ctypes.c_int),
        ("user_data", ctypes.c_void_p),
        ("id", _Identity),
    )


_Callback = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.POINTER(_Event)
)


class LibraryError(RuntimeError):
    """espeak-ng is missing, or does not do what it is asked for."""


@dataclass(frozen=True)
class Spoken:
    """What the library gives for a text."""

    samples: bytes
    """16-bit, of this machine's byte order."""
    events: tuple[tuple[str, int], ...]
    """A phone in IPA, and the sample at which it starts; the name is empty where none is spoken."""


class Library:
    """The library, initialised once in a process.

    Its synthesiser keeps a state from one text to the next, which changes samples slightly. Terminating and
    initialising it again was seen to hang (1.51), so equal samples for equal texts need a process each.

    Attributes:
        sample_rate: of its samples, per second.
        variants: names of the voice variants that are installed.

    Raises:
        LibraryError: it is not installed, or has no data.
    """

    def __init__(self) -> None:
        name = ctypes.util.find_library("espeak-ng") or "libespeak-ng.so.1"
        try:
            self._library: Any = ctypes.CDLL(name)
        except OSError as error:
            raise LibraryError(f"espeak-ng is not installed ({error})") from error
        self._pieces: list[bytes] = []
        self._events: list[tuple[str, int]] = []
        self._callback = _Callback(self._receive)  # held, as the library calls it later
        options = _PHONE_EVENTS | _IPA | _DONT_EXIT
        self.sample_rate: int = self._library.espeak_Initialize(_SYNCHRONOUS, 0, None, options)
        if self.sample_rate <= 0:
            raise LibraryError("espeak-ng finds no data: install the package espeak-ng-data")
        self._library.espeak_SetSynthCallback(self._callback)
        path = ctypes.c_char_p()
        self._library.espeak_Info.restype = ctypes.c_char_p
        self._library.espeak_Info(ctypes.byref(path))
        folder = os.path.join(os.fsdecode(path.value or b""), "voices", "!v")
        self.variants = tuple(sorted(os.listdir(folder))) if os.path.isdir(folder) else ()

    def speak(self, text: str, voice: str, rate: int, pitch: int) -> Spoken:
        """Speak a text.

        Args:
            text: to speak.
            voice: a language with a variant, as in "en-us+f1".
            rate: words per minute, 80 to 450.
            pitch: 0 to 99.

        Raises:
            LibraryError: there is no such voice, or the library fails.
        """
        self._pieces, self._events = [], []
        if self._library.espeak_SetVoiceByName(voice.encode()):
            raise LibraryError(f"espeak-ng has no voice {voice!r}")
        self._library.espeak_SetParameter(_RATE, rate, 0)
        self._library.espeak_SetParameter(_PITCH, pitch, 0)
        data = text.encode()
        status = self._library.espeak_Synth(
            data, ctypes.c_size_t(len(data) + 1), 0, 1, 0, _UTF8 | _END_PAUSE, None, None
        )
        if status or self._library.espeak_Synchronize():
            raise LibraryError(f"espeak-ng cannot speak {text!r}")
        return Spoken(b"".join(self._pieces), tuple(self._events))

    def _receive(self, samples: Any, num_samples: int, events: Any) -> int:
        if samples and num_samples > 0:
            self._pieces.append(ctypes.string_at(samples, 2 * num_samples))
        index = 0
        while events[index].type:
            event = events[index]
            if event.type == _PHONE:
                name = bytes(event.id.string).split(b"\0")[0]
                self._events.append((name.decode("utf-8", "ignore"), event.sample))
            index += 1
        return 0
