"""What the fuzz tests share: damaged texts, values of any shape, and a count of how their reading ended."""

from __future__ import annotations

import copy
import os
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from thrifty.core.errors import ThriftyError

__all__ = ["VALUES", "Outcomes", "changed", "damaged", "fuzz"]

_TIMES = float(os.environ.get("THRIFTY_TEST_FUZZ", "1"))  # how often the usual number of inputs


def fuzz(examples: int) -> Any:
    """Hypothesis settings for `examples` inputs; `CI=1` takes the same each time, as hypothesis does by itself."""
    checks = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture, HealthCheck.data_too_large]
    return settings(max_examples=max(1, int(examples * _TIMES)), deadline=None, suppress_health_check=checks)


class Outcomes(Counter[str]):
    """How often reading ended well, and how often in one line that says what is wrong. All else is raised."""

    def of(self, read: Callable[[], Any]) -> None:
        try:
            read()
        except ThriftyError:
            self["refused"] += 1
        else:
            self["read"] += 1

    def tell(self, what: str) -> None:
        assert self["read"] > 0  # else only the damage was looked at
        assert self["refused"] > 0
        print(f"{what}: {self.total()} inputs, {self['read']} read, {self['refused']} refused")


_SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 99),
    st.sampled_from([0.0, -0.0, 1e-3, 1e308, 10**30, -(10**400), 2**63]),
    st.floats(),
    st.text(max_size=12),
    st.sampled_from(["", "smt", "full", "auto", "1%", "2\n", "\ud83d", "a" * 300, "../..", "\x00", "²", "{{", "null"]),
)
VALUES = st.recursive(
    _SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(st.text(max_size=8) | st.sampled_from(["a", "0"]), inner, max_size=3),
    ),
    max_leaves=6,
)
_SPANS = [b"", b"[" * 40, b"{" * 3000, b"[" * 100_000, b"9" * 5000, b"&a [*a]", b"!!int x", b"!!timestamp 9", b"\x00"]
_SPANS += [
    b"\xff\xfe",
    b"\xed\xa0\xbd",
    b": ",
    b"- ",
    b"'",
    b'"',
    b"\n",
    b"\t",
    b"1e999",
    b"<<: *a",
    b"!!binary =",
    b"NaN",
]
_SPANS += [b"? ? ?", b"*x", b"---\n", b"%YAML 9", b"\xe2\x80\xa8", b",", b"\\ud83d", b"\\u0000", b"#", b"\r"]


def damaged(whole: Sequence[bytes]) -> st.SearchStrategy[bytes]:
    """One of `whole` with up to three spans replaced, or bytes that were none of them."""
    span = st.sampled_from(_SPANS) | st.binary(max_size=6) | st.integers(2, 40).map(lambda n: b"[" * n)
    place = st.tuples(st.floats(0, 1), st.integers(0, 30), span)

    def replaced(data: bytes, places: list[tuple[float, int, bytes]]) -> bytes:
        for share, length, new in places:
            start = int(share * len(data))
            data = data[:start] + new + data[start + length :]
        return data

    small = st.tuples(
        st.floats(0, 1), st.integers(0, 2), st.binary(max_size=2) | st.sampled_from([b" ", b"a", b"1", b'"'])
    )
    one = st.builds(replaced, st.sampled_from(list(whole)), st.lists(place | small, max_size=3))
    return st.one_of(one, one, st.binary(max_size=60), st.text(max_size=60).map(lambda t: t.encode(errors="replace")))


def changed(value: Any) -> st.SearchStrategy[Any]:
    """`value`, plain data, with one or two of its parts, anywhere, replaced, removed or put where another was."""
    paths = list(_paths(value, ()))

    def apply(changes: list[tuple[tuple[Any, ...], str, Any, tuple[Any, ...]]]) -> Any:
        made = copy.deepcopy(value)
        for path, how, new, other in changes:
            try:
                holder = _at(made, path[:-1])
                if how == "remove":
                    del holder[path[-1]]
                else:
                    holder[path[-1]] = copy.deepcopy(_at(value, other)) if how == "move" else new
            except (LookupError, TypeError):  # an earlier change took it away
                continue
        return made

    change = st.tuples(
        st.sampled_from(paths), st.sampled_from(["put", "put", "remove", "move"]), VALUES, st.sampled_from(paths)
    )
    return st.lists(change, min_size=1, max_size=2).map(apply)


def _at(value: Any, path: Sequence[Any]) -> Any:
    for key in path:
        value = value[key]
    return value


def _paths(value: Any, path: tuple[Any, ...]) -> Any:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield (*path, key)
        yield from _paths(item, (*path, key))
