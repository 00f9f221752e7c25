"""Recipes, flags and run folders of strangers."""

import contextlib
import json
import shutil
from pathlib import Path

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pixeldip import DiPPipeline, UserError
from pixeldip.recipe import Recipe, load_recipe, parse_recipe, recipe_values, save_recipe
from pixeldip.run_folder import checkpoints, preview_files, read_evaluations, read_metrics, resolve_model, step_of
from pixeldip.sampling import MOST_SEEDS, parse_seeds

from .common import FUZZ, JSON

SECTIONS = recipe_values(Recipe())
KNOWN_KEYS = st.fixed_dictionaries(
    {},
    optional={
        name: st.fixed_dictionaries({}, optional={key: st.just(default) | JSON for key, default in section.items()})
        | JSON
        if isinstance(section, dict)
        else st.just(section) | JSON
        for name, section in SECTIONS.items()
    },
)


# recipes


@settings(max_examples=300, **FUZZ)
@given(values=KNOWN_KEYS | JSON)
def test_a_recipe_is_one_or_is_refused(values: object, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    try:
        recipe = load_recipe(str(path))
    except UserError as error:
        assert len(str(error)) < 20_000
        return
    save_recipe(recipe, path)
    assert load_recipe(str(path)) == recipe == parse_recipe(recipe_values(recipe))


LAUGHS = "\n".join(["a0: &a0 [x, x]", *(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 9))])


@settings(max_examples=200, **FUZZ)
@example(text=b"\xff\xfe\x00")
@example(text=b"out: !!python/object/apply:os.abort []")
@example(text=f"{LAUGHS}\nout: *a8".encode())
@example(text=b"out: &a [*a]")
@example(text=b"[" * 20_000)
@example(text=b"training: {seed: " + b"9" * 5000 + b"}")
@example(text=b"training: {steps: 0x" + b"f" * 5000 + b"}")
@example(text=b"optimizer: {lr: .inf}")
@given(text=st.binary(max_size=60) | st.text("{}[]:-&*!?|>'\"%@`,# \nabc019.~", max_size=40).map(str.encode))
def test_text_that_is_no_recipe(text: bytes, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_bytes(text)
    try:
        recipe = load_recipe(str(tmp_path / "recipe.yaml"))
    except UserError as error:
        assert len(str(error)) < 20_000
        return
    assert recipe == Recipe()  # nothing, or comments


# flags


@settings(max_examples=300, **FUZZ)
@example("9" * 5000)
@example("0-" + "9" * 30)
@example("5--3")
@given(st.text("0123456789-, \t+_x", max_size=12) | st.text(max_size=12))
def test_seeds_are_a_short_list_or_refused(text: str) -> None:
    with contextlib.suppress(UserError):
        seeds = parse_seeds(text, 1000)
        assert 1 <= len(seeds) <= 1000 and all(0 <= seed < 2**63 for seed in seeds)


@settings(max_examples=100, **FUZZ)
@given(st.lists(st.tuples(st.integers(0, 2**63 - 60), st.integers(0, 50)), min_size=1, max_size=5))
def test_seed_ranges(runs: list[tuple[int, int]]) -> None:
    text = ",".join(f"{first}-{first + more}" if more else str(first) for first, more in runs)
    assert parse_seeds(text) == [seed for first, more in runs for seed in range(first, first + more + 1)]
    with pytest.raises(UserError, match="the most here"):
        parse_seeds(f"{text},0-{MOST_SEEDS}")


@settings(max_examples=200, **FUZZ)
@example(label="9" * 5000)
@example(label="-1")
@example(label=True)
@given(label=st.text(max_size=8) | st.integers() | st.floats() | st.sampled_from(["ant", "bee", "cow", "0", "2"]))
def test_classes_are_the_models_or_refused(label: object, pipeline: DiPPipeline) -> None:
    names = pipeline.config.class_names
    try:
        index = pipeline.class_id(label)
    except UserError:
        assert label not in names
        return
    assert 0 <= index < 3 and (label not in names or names[index] == label)


# run folders

STEP = st.fixed_dictionaries(
    {"step": st.integers(0, 50), "loss": st.floats(0, 9), "images_per_second": st.floats(1, 9)}
)
KEYS = st.sampled_from(["step", "loss", "images_per_second", "event", "metrics", "floors"])
GARBAGE = (
    st.binary(max_size=30).map(lambda data: data.replace(b"\n", b""))
    | JSON.map(lambda value: json.dumps(value).encode())
    | st.dictionaries(KEYS, JSON)
    .filter(lambda d: "step" not in d or not isinstance(d["step"], int))
    .map(lambda value: json.dumps(value).encode())
    | st.sampled_from(
        [
            b"[" * 100_000,
            b'{"step": ' + b"9" * 5000 + b"}",
            b"\0" * 99,
            b'{"event": "evaluation", "step": 1}',
            b'{"step": 1, "loss": "x", "images_per_second": 1}',
        ]
    )
)


@settings(max_examples=200, **FUZZ)
@given(lines=st.lists(st.tuples(STEP, GARBAGE), max_size=5))
def test_garbage_in_the_log_is_passed_over(lines: list[tuple[dict, bytes]], tmp_path: Path) -> None:
    raw = [part for entry, garbage in lines for part in (json.dumps(entry).encode(), garbage)]
    (tmp_path / "metrics.jsonl").write_bytes(b"\n".join(raw))
    expected = {entry["step"]: entry for entry, _ in lines}
    assert read_metrics(tmp_path) == [expected[step] for step in sorted(expected)]
    assert read_evaluations(tmp_path) == []


@settings(max_examples=60, **FUZZ)
@given(
    steps=st.sets(st.integers(0, 10**12), min_size=1, max_size=5),
    others=st.lists(st.text("0123456789-.~ \nabc", max_size=12), max_size=4),
)
def test_copies_beside_checkpoints_are_none(steps: set[int], others: list[str], tmp_path: Path) -> None:
    shutil.rmtree(tmp_path / "run", ignore_errors=True)
    for place in ("checkpoints", "previews"):
        names = [f"step-{step:08d}" for step in steps]
        for name in [*names, *(f"step-{other}x" for other in others), f"{names[0]}-copy", f"{names[0]}.bak"]:
            path = tmp_path / "run" / place / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.mkdir(exist_ok=True) if place == "checkpoints" else path.with_name(f"{name}.png").touch()
    assert [step_of(path) for path in checkpoints(tmp_path / "run")] == sorted(steps)
    assert [step_of(path) for path in preview_files(tmp_path / "run")] == sorted(steps)


@settings(max_examples=200, **FUZZ)
@example("a\0b")
@example("../../etc/passwd")
@given(st.text(max_size=12) | st.text("./~a\\:", max_size=8))
def test_a_models_name_is_a_folder_a_hub_id_or_refused(name: str) -> None:
    with contextlib.suppress(UserError):
        found = resolve_model(name)
        assert Path(found).is_dir() or found.count("/") == 1
