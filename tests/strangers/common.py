"""What strangers send: whatever the bytes, the answer is a UserError or the right thing, and no code of theirs runs."""

from pathlib import Path

from hypothesis import HealthCheck
from hypothesis import strategies as st

FUZZ = {"deadline": None, "suppress_health_check": [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]}
HOSTILE_NAMES = ["new\nline", "esc\x1b[31mred\x1b]0;title\x07", "[bold]", "emoji \U0001f600", ":fire:", "a b #1?"]

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=8,
)


class Payload:
    """Unpickled by a reader that runs code, it makes a file."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self) -> tuple:
        return open, (str(self.mark), "w")
