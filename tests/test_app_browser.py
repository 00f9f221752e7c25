"""The page in a real Chromium, as a person uses it: started by the command line, clicked and typed into.

Needs a Chromium: Debian's or Ubuntu's (apt install chromium), any Chrome, or Playwright's own
(.venv/bin/playwright install chromium).
"""

import json
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

pytest.importorskip("gradio", reason="the page needs Gradio: pip install 'pixeldip[app]'")
pytest.importorskip("playwright", reason="needs Playwright: pip install playwright")
from playwright.sync_api import Browser, Error, Page, expect, sync_playwright

from pixeldip.cli import main
from pixeldip.images import save_png
from pixeldip.training import train

from .conftest import saved_model, tiny_recipe

PHONE, DESKTOP = {"width": 320, "height": 640}, {"width": 1280, "height": 900}
ELSEWHERE: list[str] = []  # what pages asked of other machines
PATIENCE = 60_000  # milliseconds; a busy machine answers late


def chromium() -> str | None:
    """An installed Chromium or Chrome, or None for Playwright's own."""
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    return next(filter(None, map(shutil.which, names)), None)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as tools:
        try:
            browser = tools.chromium.launch(executable_path=chromium(), args=["--no-sandbox"])
        except Error:
            pytest.skip("no Chromium: apt install chromium, or .venv/bin/playwright install chromium")
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's folder: a saved model of three classes and a run with previews."""
    folder = tmp_path_factory.mktemp("user")
    saved_model(folder / "models" / "insects", 16)
    recipe = tiny_recipe(
        folder / "runs" / "first",
        "emoji",
        data={"resolution": 16},
        training={"steps": 4, "save_every": 2},
        preview={"every": 2, "images": 4, "steps": 2},
    )
    train(recipe, Console(quiet=True))
    return folder


@contextmanager
def served(folder: Path, *models: str) -> Iterator[str]:
    """The page's address, served by `pixeldip app` until Ctrl-C."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "pixeldip.cli", "app", *models, "--port", str(port)]
    flags = ["--device", "cpu", "--precision", "fp32", "--max-images", "8", "--max-steps", "2000", "--max-queue", "2"]
    server = subprocess.Popen(
        [*command, *flags],
        cwd=folder,
        stdout=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # ignored by what a shell starts behind itself
    )
    try:
        line = server.stdout.readline()
        assert f"http://127.0.0.1:{port}" in line and "runs/gallery" in line, line
        yield f"http://127.0.0.1:{port}/"
        server.send_signal(signal.SIGINT)
        assert server.wait(30) == 130
    finally:
        server.kill()


@pytest.fixture(scope="module")
def address(folder: Path) -> Iterator[str]:
    with served(folder, "models/insects") as address:
        yield address


@pytest.fixture
def page(browser: Browser, address: str, tmp_path: Path) -> Iterator[Page]:
    page = opened(browser, address, DESKTOP)
    yield page
    page.screenshot(path=tmp_path / "page.png", full_page=True)  # to look at when the test failed
    page.context.close()
    elsewhere, ELSEWHERE[:] = list(ELSEWHERE), []
    assert elsewhere == []


def visited(browser: Browser, address: str, viewport: dict[str, int]) -> Page:
    """A fresh page; it must ask nothing of other places."""
    page = browser.new_context(viewport=viewport).new_page()
    page.set_default_timeout(PATIENCE)
    expect.set_options(timeout=PATIENCE)
    page.on("request", lambda r: None if r.url.startswith((address, "data:", "blob:")) else ELSEWHERE.append(r.url))
    page.goto(address)
    return page


def opened(browser: Browser, address: str, viewport: dict[str, int]) -> Page:
    """A fresh page that has answered."""
    page = visited(browser, address, viewport)
    expect(field(page, "Model")).to_have_value("models/insects")
    expect(page.get_by_label("Height").first).to_have_value("16")
    expect(page.locator("#generate")).to_be_enabled()
    return page


def field(page: Page, label: str):
    return page.get_by_role("listbox", name=label, exact=True).or_(page.get_by_label(label, exact=True)).first


def choose(page: Page, label: str, option: str) -> None:
    """Chooses an option of the field, in the tab that is shown."""
    page.get_by_label(label, exact=True).locator("visible=true").click()
    page.get_by_role("option", name=option).locator("visible=true").click()


def generate(page: Page) -> None:
    """Presses Generate and waits for the result and its place in the gallery."""
    first = page.locator("#gallery img").first
    before = first.get_attribute("src") if first.count() else ""
    page.get_by_role("button", name="Generate").click()
    expect(page.locator("#progress")).to_contain_text("images in")
    expect(first).not_to_have_attribute("src", before)


def newest(folder: Path) -> Path:
    return max((folder / "runs" / "gallery").glob("*.png"))


def shown_picture(page: Page, selector: str) -> np.ndarray:
    """The pixels of a picture as the page got them."""
    source = page.locator(f"{selector} img").first.get_attribute("src")
    with urllib.request.urlopen(source) as answer:
        return np.asarray(Image.open(answer).convert("RGB"))


def told(page: Page, text: str) -> None:
    """Expects a message in the page."""
    expect(page.get_by_text(text)).to_be_visible()


def test_generate_and_walk_along_the_path(page: Page, folder: Path, tmp_path: Path) -> None:
    page.get_by_label("Seeds (at most 8)").first.fill("3-5")
    generate(page)
    final = shown_picture(page, "#picture")
    model = str(folder / "models" / "insects")
    sampled = ["sample", model, "--seeds", "3-5", "--out", str(tmp_path), "--precision", "fp32", "--device", "cpu"]
    assert main(sampled) == 0
    kept = sorted((folder / "runs" / "gallery").glob("*.png"))[-3:][::-1]
    for i, file in enumerate(kept):
        assert np.array_equal(Image.open(file), Image.open(tmp_path / f"{i:06d}.png"))
    path = page.get_by_role("slider", name="range slider for Path, noise to image")
    path.focus()
    page.keyboard.press("Home")
    assert path.evaluate("slider => getComputedStyle(slider).outlineStyle") == "solid"  # where the keyboard is
    expect(page.locator("#progress")).to_contain_text("t = 0.000")
    noise = shown_picture(page, "#picture")
    page.keyboard.press("ArrowRight")
    expect(page.locator("#progress")).not_to_contain_text("t = 0.000")
    heading = shown_picture(page, "#picture")
    seen = page.locator("#picture img").first.get_attribute("src")
    page.get_by_label("noisy image x_t").check()
    expect(page.locator("#picture img").first).not_to_have_attribute("src", seen)
    noisy = shown_picture(page, "#picture")
    assert not np.array_equal(noisy, heading) and not np.array_equal(noise, heading)
    assert not np.array_equal(noise, final)


def test_restore_from_the_gallery(page: Page, folder: Path, tmp_path: Path) -> None:
    page.get_by_label("Seeds (at most 8)").first.fill("11")
    page.get_by_label("number input for Steps").first.fill("3")
    page.get_by_label("number input for Guidance").first.fill("1.5")
    page.keyboard.press("Tab")
    generate(page)
    first = newest(folder)
    page.get_by_label("Seeds (at most 8)").first.fill("0-7")
    page.get_by_label("number input for Steps").first.fill("2")
    page.get_by_label("number input for Guidance").first.fill("7")
    page.keyboard.press("Tab")
    generate(page)
    page.locator("#gallery button").nth(8).click()
    made_with = re.compile("ant, seed 11 · euler, 3 steps · guidance 1.5")
    expect(page.locator("#made-with textarea")).to_have_value(made_with)
    expect(page.locator("#chosen img")).to_be_visible()
    page.get_by_role("button", name="Restore settings").click()
    expect(page.get_by_label("Seeds (at most 8)").first).to_have_value("11")
    expect(page.get_by_label("number input for Guidance").first).to_have_value("1.5")
    generate(page)
    expect(page.locator("#gallery button").nth(9)).to_have_class(re.compile("selected"))  # the same picture
    expect(page.locator("#made-with textarea")).to_have_value(made_with)
    first.rename(tmp_path / first.name)
    generate(page)
    expect(page.locator("#gallery button.selected")).to_have_count(0)
    expect(page.locator("#made-with textarea")).to_have_value("")
    expect(page.get_by_role("button", name="Restore settings")).to_be_disabled()
    (tmp_path / first.name).rename(first)
    assert newest(folder) != first and np.array_equal(Image.open(newest(folder)), Image.open(first))


def test_restore_from_files(page: Page, tmp_path: Path) -> None:
    upload = page.locator("input[type=file]").first
    Image.new("RGB", (8, 8)).save(tmp_path / "plain.png")
    upload.set_input_files(tmp_path / "plain.png")
    told(page, "does not say how it was made")
    note = {"model": "<img src=x onerror=alert(1)>", "seed": "a", "num_inference_steps": 1}
    save_png(Image.new("RGB", (8, 8)), tmp_path / "strange.png", note)
    upload.set_input_files(tmp_path / "strange.png")
    told(page, "the picture's settings cannot be read")
    whole = {"solver": "heun", "guidance_scale": 3.5, "guidance_interval": [0, 0.8], "time_shift": 1, "height": 24}
    note |= {"seed": 7, "num_inference_steps": 9, "width": 16, "class": "cow", **whole}
    save_png(Image.new("RGB", (8, 8)), tmp_path / "elsewhere.png", note)
    upload.set_input_files(tmp_path / "elsewhere.png")
    told(page, "the model it was made by is not offered here (<img src=x onerror=alert(1)>)")
    expect(page.get_by_label("Seeds (at most 8)").first).to_have_value("7")
    expect(page.get_by_label("Height").first).to_have_value("24")


@pytest.mark.parametrize(
    ("label", "value", "message"),
    [
        ("Seeds (at most 8)", "0-8", "9 images, and 8 are the most here"),
        ("Seeds (at most 8)", "<b>x</b>", "seeds '<b>x</b>': expected numbers"),
        ("Height", "20", "must be multiples of 8"),
        ("Height", "16.5", "Height: input should be a valid integer"),
        ("Width", "4096", "Width: at most 1024 pixels"),
        ("Time shift", "0", "Time shift: input should be greater than 0"),
    ],
)
def test_mistakes_are_told_in_the_page(page: Page, label: str, value: str, message: str) -> None:
    page.get_by_label(label).first.fill(value)
    page.keyboard.press("Tab")
    page.get_by_role("button", name="Generate").click()
    told(page, message)


def test_stop(browser: Browser, address: str, page: Page, folder: Path) -> None:
    generate(page)
    path = page.get_by_role("slider", name="range slider for Path, noise to image")
    expect(path).to_be_enabled()
    before = newest(folder)
    page.get_by_label("number input for Steps").first.fill("2000")
    page.keyboard.press("Tab")
    page.get_by_role("button", name="Generate").click()
    expect(page.locator("#progress")).to_contain_text("/2000")
    expect(path).to_be_disabled()
    waiting = opened(browser, address, DESKTOP)
    waiting.get_by_role("button", name="Generate").click()
    told(waiting, "queue: 1/1")
    waiting.get_by_role("tab", name="Head").click()
    waiting.get_by_role("button", name="Measure").click()
    waiting.get_by_role("button", name="Stop").locator("visible=true").click()
    expect(waiting.locator("#measured")).to_have_text("not completed")
    waiting.context.close()
    page.get_by_role("button", name="Stop").first.click()
    expect(page.locator("#progress")).to_have_text("not completed")
    path.focus()
    page.keyboard.press("Home")
    expect(page.locator("#progress")).to_have_text("t = 0.000")
    page.get_by_label("number input for Steps").first.fill("1")
    page.keyboard.press("Tab")
    page.get_by_label("Seeds (at most 8)").first.fill("1")
    generate(page)
    after = newest(folder)
    assert after != before and json.loads(Image.open(after).info["pixeldip"])["num_inference_steps"] == 1
    assert sum(file.name > before.name for file in after.parent.glob("*.png")) == 1


def test_compare(page: Page, folder: Path) -> None:
    newest_shown = page.locator("#gallery img").first
    before = newest_shown.get_attribute("src")
    page.get_by_role("tab", name="Compare").click()
    expect(page.get_by_label("number input for Guidance").nth(2)).to_have_value("1")
    page.get_by_role("button", name="Compare").click()
    expect(page.locator("#comparison")).to_contain_text("PSNR between them")
    assert not np.array_equal(*(shown_picture(page, f"#compared-{side}") for side in "AB"))
    page.get_by_label("number input for Guidance").nth(2).fill("4")  # as A
    page.keyboard.press("Tab")
    page.get_by_role("button", name="Compare").click()
    expect(page.locator("#comparison")).to_contain_text("The images are equal.")
    seeds = [json.loads(Image.open(f).info["pixeldip"])["seed"] for f in (folder / "runs" / "gallery").glob("*.png")]
    assert set(range(8)) <= set(seeds)
    page.get_by_role("tab", name="Generate").click()
    expect(newest_shown).not_to_have_attribute("src", before)


def test_what_the_head_adds(page: Page) -> None:
    page.get_by_role("tab", name="Head").click()
    page.get_by_role("button", name="Measure").click()
    expect(page.locator("#measured")).to_contain_text("White noise:")
    expect(page.get_by_text("t = 0.500")).to_be_visible()
    expect(page.get_by_alt_text("The velocity", exact=True)).to_be_visible()
    slider = page.get_by_role("slider", name="range slider for Step, from noise to image")
    slider.focus()
    page.keyboard.press("Home")
    expect(page.get_by_text("t = 0.000")).to_be_visible()


def test_models_that_cannot_be_read_or_have_no_head(browser: Browser, tmp_path: Path) -> None:
    saved_model(tmp_path / "models" / "damaged", 16)
    (tmp_path / "models" / "damaged" / "model" / "config.json").write_text("{", encoding="utf-8")
    saved_model(tmp_path / "models" / "dit", 16, head="linear", head_width=None, sampling={"num_inference_steps": 7})
    with served(tmp_path) as address:
        page = visited(browser, address, DESKTOP)
        expect(page.get_by_text("models/damaged/model/config.json: cannot be read").first).to_be_visible()
        expect(page.locator("#generate")).to_be_disabled()
        for tab, label in (("Compare", "Model of B"), ("Head", "Model")):
            page.get_by_role("tab", name=tab).click()
            choose(page, label, "models/dit")
            if tab == "Compare":
                expect(page.get_by_label("number input for Steps").nth(2)).to_have_value("7")
        page.get_by_role("button", name="Measure").click()
        told(page, "models/dit is DiT-only")
        expect(page.locator("#measured")).to_have_text("not completed")
        page.get_by_role("tab", name="Training").click()
        told(page, "No run has begun in the folders looked through")
        assert page.locator(".gradio-container").bounding_box()["width"] == DESKTOP["width"]  # empty, it is no narrower
        page.context.close()


def test_models_that_come_and_go(browser: Browser, tmp_path: Path) -> None:
    for name, side in (("a", 16), ("b", 32)):
        saved_model(tmp_path / "models" / name, side)
    with served(tmp_path) as address:
        page = visited(browser, address, DESKTOP)
        generate_button, seeds = page.locator("#generate"), page.get_by_label("Seeds (at most 8)").first
        expect(generate_button).to_be_enabled()
        page.get_by_role("tab", name="Head").click()
        page.get_by_role("button", name="Measure").click()
        expect(page.locator("#measured")).to_contain_text("White noise:")
        choose(page, "Model", "models/b")
        expect(page.get_by_alt_text("The velocity", exact=True)).to_have_count(0)  # that was of another model
        expect(page.get_by_text("difference", exact=True)).to_have_count(0)
        page.get_by_role("button", name="Measure").click()
        expect(page.get_by_text("difference", exact=True)).to_be_visible()  # a line of the plot
        page.get_by_role("tab", name="Generate").click()
        seeds.fill("3")
        choose(page, "Model", "models/b")
        expect(page.get_by_label("Height").first).to_have_value("32")  # the button was out of use until then
        expect(generate_button).to_be_enabled()
        generate(page)
        expect(seeds).to_have_value("3")
        page.locator("#gallery button").first.click()
        shutil.rmtree(tmp_path / "models" / "b")
        saved_model(tmp_path / "models" / "c", 24)
        page.get_by_role("button", name="Restore settings").click()
        told(page, "the model it was made by is not offered here (models/b)")
        expect(generate_button).to_be_disabled()
        page.get_by_role("tab", name="Training").click()
        page.get_by_role("tab", name="Generate").click()
        choose(page, "Model", "models/c")
        expect(page.get_by_label("Height").first).to_have_value("24")
        expect(generate_button).to_be_enabled()
        page.get_by_role("tab", name="Head").click()
        expect(page.get_by_text("models/b is not here any more")).to_be_visible()
        expect(page.get_by_role("button", name="Measure")).to_be_disabled()
        page.context.close()


def test_follow_a_run(page: Page, folder: Path) -> None:
    page.get_by_role("tab", name="Training").click()
    line = page.locator("#run-line")
    expect(line).to_contain_text("step 4 of 4")
    expect(page.get_by_text("Step 4", exact=True)).to_be_visible()
    previews = page.get_by_role("slider", name="range slider for Previews over time")
    previews.focus()
    page.keyboard.press("Home")
    expect(page.get_by_text("Step 2", exact=True)).to_be_visible()
    second = folder / "runs" / "second"
    shutil.copytree(folder / "runs" / "first", second)
    entry = {"step": 3, "loss": 0.125, "images_per_second": 2.0, "seconds": 1.0}
    (second / "metrics.jsonl").write_text(json.dumps(entry) + "\n")
    images = (second / "previews").rename(second / "elsewhere")
    page.get_by_role("button", name="Look for runs").click()
    choose(page, "Run", "runs/second")
    expect(line).to_contain_text("step 3 of 4 · loss 0.1250 · 2 images/s · 0:02 left")
    expect(previews).to_be_hidden()
    images.rename(second / "previews")
    expect(page.get_by_text("Step 4", exact=True)).to_be_visible()
    with (second / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({**entry, "step": 4, "loss": 0.0625}) + "\n")
    expect(line).to_contain_text("step 4 of 4 · loss 0.0625")  # by itself
    (folder / "runs" / "third").mkdir()
    (folder / "runs" / "third" / "metrics.jsonl").touch()
    page.get_by_role("button", name="Look for runs").click()
    field(page, "Run").click()
    expect(page.get_by_role("option", name="runs/third")).to_be_visible()  # it has looked
    page.keyboard.press("Escape")
    expect(field(page, "Run")).to_have_value("runs/second")
    shutil.rmtree(second)
    expect(line).to_have_text("runs/second is not here any more.")
    shutil.rmtree(folder / "runs" / "third")
    page.get_by_role("button", name="Look for runs").click()
    expect(field(page, "Run")).to_have_value("runs/first")


def test_on_a_phone_from_the_keyboard(browser: Browser, address: str, tmp_path: Path) -> None:
    page = opened(browser, address, PHONE)
    for tab in ("Compare", "Head", "Training", "Generate"):
        page.get_by_role("tab", name=tab).click()
        expect(page.get_by_role("tab", name=tab)).to_have_attribute("aria-selected", "true")
        page.wait_for_timeout(300)
        assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"], tab
        if tab == "Head":
            page.set_viewport_size({"width": 400, "height": 800})
            captions = ("What the velocity leads to", "The same, without the context")
            one, other = (page.get_by_text(caption, exact=True).first.bounding_box() for caption in captions)
            assert one["x"] == other["x"] or one["y"] == other["y"]  # below what it is compared with, or beside it
            page.set_viewport_size(PHONE)
    seeds = page.get_by_label("Seeds (at most 8)").first
    seeds.focus()
    page.keyboard.press("ControlOrMeta+a")
    page.keyboard.type("2")
    for _ in range(40):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.id") == "generate":
            break
    page.keyboard.press("Enter")
    expect(page.locator("#progress")).to_contain_text("1 images in")
    expect(page.locator("#picture img")).to_be_in_viewport()
    page.screenshot(path=tmp_path / "phone.png")
    seen = np.asarray(Image.open(tmp_path / "phone.png").convert("RGB"))
    assert seen.shape == (PHONE["height"], PHONE["width"], 3) and len(np.unique(seen.reshape(-1, 3), axis=0)) > 100
    page.context.close()


def test_files_stay_where_they_are(address: str, folder: Path) -> None:
    for path in (
        "/etc/hosts",
        folder / "models" / "insects" / "model_index.json",
        folder / "runs" / "first" / "recipe.yaml",
    ):
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(f"{address}gradio_api/file={path}")
        assert refused.value.code in (403, 404)


def test_a_taken_port_and_an_empty_folder(address: str, folder: Path, capsys: pytest.CaptureFixture) -> None:
    port = address.strip("/").rpartition(":")[2]
    gallery = ["--gallery", str(folder / "g")]
    assert main(["app", str(folder / "models" / "insects"), "--port", port, *gallery]) == 2
    assert f"port {port} is taken; choose another with --port" in capsys.readouterr().err
    assert main(["app", "--folders", str(folder / "nothing"), *gallery]) == 2
    assert "name one, or make one with pixeldip demo" in capsys.readouterr().err


def test_a_full_queue_turns_away(browser: Browser, address: str) -> None:
    pages = [opened(browser, address, DESKTOP) for _ in range(5)]  # one works, two wait
    for page in pages:
        page.get_by_label("number input for Steps").first.fill("2000")
        page.keyboard.press("Tab")
        page.get_by_role("button", name="Generate").click()

    def turned_away() -> int:
        return sum(page.get_by_text("currently busy").count() for page in pages)

    end = time.monotonic() + PATIENCE / 1000
    while not turned_away() and time.monotonic() < end:
        pages[0].wait_for_timeout(100)
    assert turned_away()
    for page in pages:
        page.context.close()


def test_two_people_at_once(browser: Browser, address: str) -> None:
    pages = [opened(browser, address, DESKTOP) for _ in range(2)]
    pages[0].get_by_role("button", name="Generate").click()
    pages[1].get_by_label("Seeds (at most 8)").first.press("Enter")
    for page in pages:
        expect(page.locator("#progress")).to_contain_text("images in")
        page.context.close()
