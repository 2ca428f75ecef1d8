"""What comes from outside never breaks a promise: the corpus of what was found, and mutations by hypothesis.

`make fuzz` looks further, with atheris: see tests/fuzz.
"""

import random
import resource
import time
from collections.abc import Callable

import pytest
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

from tests.fuzz.targets import SEEDS, TARGETS, application, corpus

HANG_S = 20.0  # on a busy machine; `make fuzz` allows a second
GROWTH_MIB = 200
TOKENS = (
    b"\0",
    b"\xff" * 8,
    b"\r\n",
    b'"',
    b"--x",
    b"[" * 2000,
    b"9" * 5000,
    b"-1",
    b"null",
    b"{}",
    b"1e999",
    b"\x80\0\0\0",
)
mutated = settings(max_examples=60, deadline=None, database=None, suppress_health_check=list(HealthCheck))


@pytest.fixture(scope="module", autouse=True)
def _application_ends() -> object:
    yield
    if application.cache_info().currsize:
        application().close()
        application.cache_clear()


def timed(target: Callable[[bytes], None], data: bytes) -> None:
    """Call the target. Fails where it hangs."""
    began = time.monotonic()
    target(data)
    assert time.monotonic() - began < HANG_S, data[:200]


def mutant(whole: bytes, chance: random.Random) -> bytes:
    """The input with a few bytes changed, left out, put in, doubled or cut off."""
    data = bytearray(whole)
    for _ in range(chance.randint(1, 6)):
        place = chance.randint(0, len(data))
        act = chance.randrange(5)
        if act == 0 and data:
            data[place % len(data)] = chance.randrange(256)
        elif act == 1:
            data[place : place + chance.randint(1, 30)] = b""
        elif act == 2:
            data[place:place] = chance.choice(TOKENS)
        elif act == 3:
            data[place:place] = data[place : place + chance.randint(1, 200)]
        elif chance.random() < 0.3:
            del data[place:]
    return bytes(data)


@pytest.mark.parametrize("name", TARGETS)
def test_what_was_found_once_is_found_no_more(name: str) -> None:
    for data in [*SEEDS[name](), *corpus(name)]:
        timed(TARGETS[name], data)


@pytest.mark.parametrize("name", TARGETS)
def test_no_mutation_breaks_a_promise(name: str) -> None:
    wholes = [*SEEDS[name](), *corpus(name)]
    target = TARGETS[name]

    @seed(13)
    @mutated
    @given(whole=st.sampled_from(wholes), chance=st.integers(0, 2**32))
    def check(whole: bytes, chance: int) -> None:
        timed(target, mutant(whole, random.Random(chance)))

    check()


@pytest.mark.parametrize("name", TARGETS)
def test_no_bytes_break_a_promise(name: str) -> None:
    @seed(13)
    @mutated
    @given(data=st.binary(max_size=300) | st.text(max_size=100).map(str.encode))
    def check(data: bytes) -> None:
        timed(TARGETS[name], data)

    check()


@pytest.mark.parametrize("name", TARGETS)
def test_what_is_sent_again_and_again_takes_no_more_memory(name: str) -> None:
    wholes, chance = [*SEEDS[name](), *corpus(name)], random.Random(13)
    for whole in wholes:
        TARGETS[name](whole)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for number in range(100):
        TARGETS[name](mutant(wholes[number % len(wholes)], chance))
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024 < GROWTH_MIB
