"""The page in a real browser: it samples, its noise and images are Python's, it fetches nothing from elsewhere."""

from __future__ import annotations

import itertools
import json
import re
import shlex
import shutil
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from advkd.cache.format.condition import ClassCondition
from advkd.cache.format.noise import standard_normal
from advkd.pipeline.cli.page import main as page_command
from advkd.stages.page.runtime import VERSION, Runtime
from advkd.stages.pictures import to_pixels
from advkd.stages.student.config import StudentConfig, TrainConfig
from advkd.stages.student.hub import Student
from advkd.stages.student.sharing.onnx_student import OnnxStudent
from advkd.stages.student.train import train
from tests.browser import errors, open_browser, require_browser, served, set_device, wait_until_shown
from tests.conftest import ROOT, Invoke
from tests.pipeline.readme import shell_blocks
from tests.pipeline.servers import model_hub
from tests.stores import write_store

PAGE = (ROOT / "docs/page.md").read_text()
CONFIG = TrainConfig(student=StudentConfig(width=8, depth=1, attention=False), steps=8, batch_size=16)
CLASSES = ClassCondition(num_classes=5, labels=(0, 1, 3), guidance=2.5, null_class=4)
HOSTILE = "<script>alert(1)</script>\"'><img src=x onerror=alert(2)>\u202egnirts"
GRID = """
const canvas = document.getElementById(arguments[0]);
return Array.from(canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data);
"""
NOISE = """
const [root, seeds, size, dtype, done] = arguments;
import("./noise.js").then(({standardNormal}) => {
  const values = standardNormal(root, seeds, size, dtype);
  done(Array.from(new Uint32Array(values.buffer)));
}).catch((error) => done(String(error)));
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stores and runs: `toy`, and `classes` with three classes."""
    folder = tmp_path_factory.mktemp("home")
    for name, changes in {"toy": {}, "classes": {"condition": CLASSES}}.items():
        write_store(folder / f"cache/{name}.zarr", "0:128", **changes)
        train(folder / f"cache/{name}.zarr", CONFIG, folder / f"runs/{name}")
    return folder


@pytest.fixture(scope="module")
def toy_page(home: Path) -> Path:
    """The page of the run `toy`, with a copied runtime; tests only read it."""
    arguments = [home / "runs/toy", "--cache", home / "cache/toy.zarr", "--title", "Toy", "--out", home / "page/site"]
    result = CliRunner().invoke(page_command, [*map(str, arguments), "--runtime", str(require_browser())])
    assert result.exit_code == 0, result.output
    return home / "page/site"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    require_browser()
    with open_browser() as driver:
        yield driver


def shown_images(driver: Any, canvas: str, image_shape: tuple[int, ...], num: int) -> npt.NDArray[np.int16]:
    """The first images of a grid: RGB, shape (num, H, W, 3)."""
    _, height, width = image_shape
    sheet = np.array(driver.execute_script(GRID, canvas), dtype=np.int16).reshape(8 * (height + 1) - 1, -1, 4)
    places = [((index // 8) * (height + 1), (index % 8) * (width + 1)) for index in range(num)]
    return np.stack([sheet[y : y + height, x : x + width, :3] for y, x in places])


def assert_equal_pixels(
    found: npt.NDArray[np.int16], site: Path, run: Path, seeds: list[int], labels: list[int] | None = None
) -> None:
    """The browser's images are those of the same file in Python: within 2 of 255 in 99.9 % of all values."""
    student = OnnxStudent(next(site.glob("student*.onnx")), num_threads=1)
    told = student.labels(seeds) if labels is None else torch.tensor(labels)
    images = student(Student.from_pretrained(run).noise(seeds), told)
    expected = to_pixels(images.numpy()).astype(np.int16)
    off = np.abs(found - expected)
    assert np.mean(off <= 2) >= 0.999, f"largest difference {off.max()}"


def test_the_page_samples_what_python_samples(home: Path, toy_page: Path, browser: Any) -> None:
    run, site = home / "runs/toy", toy_page
    with served(site) as address:
        browser.get(address)
        wait_until_shown(browser, "0/")
        assert browser.title == "Toy" and not browser.find_elements("id", "unserved")
        assert_equal_pixels(shown_images(browser, "student-sheet", (1, 8, 8), 8), site, run, list(range(8)))
        teacher = np.asarray(Image.open(site / "teacher.png"), dtype=np.int16)
        beside = shown_images(browser, "teacher-sheet", (1, 8, 8), 64)
        assert (beside.reshape(8, 8, 8, 8, 3).swapaxes(1, 2).reshape(64, 64, 3) == teacher).all()
        seed = browser.find_element("id", "seed")
        seed.clear()
        seed.send_keys("9007199254740000\n")
        wait_until_shown(browser, "9007199254740000/")
        seeds = [9007199254740000 + index for index in range(8)]
        assert_equal_pixels(shown_images(browser, "student-sheet", (1, 8, 8), 8), site, run, seeds)
        assert not browser.find_element("id", "teacher-figure").is_displayed()
        browser.find_element("id", "fresh").send_keys("\n")  # by the keyboard
        wait_until_shown(browser, f"{seed.get_attribute('value')}/")
        assert 2**32 <= int(seed.get_attribute("value")) < 2**33
        status = browser.find_element("id", "status").text
        assert re.search(r"[\d.]+ ms per image, noise included, on this device \(one thread\); .* MB \(int8", status)
        assert errors(browser) == []


def test_classes_can_be_picked(invoke: Invoke, home: Path, browser: Any) -> None:
    from selenium.webdriver.support.ui import Select

    run, site, store = Path("runs/classes").absolute(), Path("site").absolute(), home / "cache/classes.zarr"
    shutil.copytree(home / "runs/classes", run)
    path = run / "student/provenance.json"
    known = json.loads(path.read_text())
    known["teacher"] |= {"class_names": {"0": "faces", "3": HOSTILE}, "attribution": "drawn by somebody"}
    path.write_text(json.dumps(known))
    for options in ((), ("--float32",)):  # the second replaces the first
        arguments = [run, "--cache", store, "--out", site, "--runtime", require_browser(), *options]
        assert invoke(page_command, *arguments).exit_code == 0
    assert len(list(site.joinpath("runtime").iterdir())) == 2
    assert sorted(path.name for path in site.glob("*.onnx")) == ["student.onnx"]
    with served(site) as address:
        browser.get(address)
        wait_until_shown(browser, "0/")
        seeds = list(range(8))
        assert_equal_pixels(shown_images(browser, "student-sheet", (1, 8, 8), 8), site, run, seeds)
        choice = Select(browser.find_element("id", "class"))
        assert [option.get_attribute("value") for option in choice.options] == ["", "0", "1", "3"]
        named = [option.text for option in choice.options[1:]]
        assert named[:2] == ["faces", "1"] and "<script>" in named[2] and "\u202e" not in named[2]
        assert browser.find_element("id", "attribution").text == "drawn by somebody"
        choice.select_by_value("3")
        wait_until_shown(browser, "0/3")
        assert_equal_pixels(shown_images(browser, "student-sheet", (1, 8, 8), 8), site, run, seeds, [3] * 8)
        beside = shown_images(browser, "teacher-sheet", (1, 8, 8), 6)
        assert [bool(image.any()) for image in beside] == [False, False, True] * 2  # the teacher drew 0, 1, 3 in turn
        assert errors(browser) == []


def test_the_slider_walks_recorded_states(home: Path, toy_page: Path, browser: Any) -> None:
    student = Student.from_pretrained(home / "runs/toy")
    with served(toy_page) as address, torch.no_grad():
        browser.get(address)
        wait_until_shown(browser, "0/")
        state, heads = browser.find_element("id", "walk-state"), student.heads(student.noise([0]))
        assert state.get_attribute("max") == str(len(heads))
        for step, made in enumerate(heads, start=1):
            state.send_keys("\ue014")  # the arrow to the right
            pixels = np.array(browser.execute_script(GRID, "walk-student"), dtype=np.uint8).reshape(8, 8, 4)[..., :3]
            assert (pixels == to_pixels(made.numpy())[0]).all()
            said = browser.find_element("id", "walk-name").text
            assert said == ("noise at timestep 499 of the teacher" if step == 1 else "x₀, the image")


def test_noise_is_pythons_to_the_bit(toy_page: Path, browser: Any) -> None:
    seeds, size = [0, 1, 7, 2**32 - 1, 2**40 + 3, 2**53 - 1], 1025
    with served(toy_page) as address:
        browser.get(address)
        for root in (0, 1, 2**53 + 1, 2**63 - 1):
            drawn = torch.from_numpy(standard_normal(root, seeds, (size,)))
            for dtype in (torch.float32, torch.float16, torch.bfloat16):
                name = str(dtype).removeprefix("torch.")
                found = np.array(browser.execute_async_script(NOISE, str(root), seeds, size, name), dtype=np.uint32)
                assert (found.view(np.float32) == drawn.to(dtype).float().numpy().ravel()).all(), (root, name)


def test_nothing_is_fetched_from_elsewhere(toy_page: Path, browser: Any) -> None:
    with served(toy_page) as address:
        browser.get(address)
        wait_until_shown(browser, "0/")
        fetched = browser.execute_script("return performance.getEntriesByType('resource').map((entry) => entry.name)")
        assert fetched and all(name.startswith(address) for name in fetched)
        assert errors(browser) == []
        other = address.replace("127.0.0.1", "localhost")  # another origin, and one that answers
        script = "fetch(arguments[0]).then(() => arguments[1]('fetched'), () => arguments[1]('refused'))"
        assert browser.execute_async_script(script, other) == "refused"
        assert any("Content Security Policy" in line for line in errors(browser))


def test_hostile_texts_are_text(invoke: Invoke, home: Path, browser: Any, tmp_path: Path) -> None:
    shutil.copytree(home / "runs/toy", tmp_path / "runs/toy")
    path = tmp_path / "runs/toy/student/provenance.json"
    known = json.loads(path.read_text())
    known["teacher"] |= {"source": HOSTILE, "license": HOSTILE, "attribution": HOSTILE, "class_names": [HOSTILE]}
    path.write_text(json.dumps(known))
    arguments = [tmp_path / "runs/toy", "--out", "site", "--runtime", require_browser(), "--title", HOSTILE]
    assert invoke(page_command, *arguments).exit_code == 0
    with served(tmp_path / "site") as address:
        browser.get(address)
        wait_until_shown(browser, "0/")
        shown = " ".join(HOSTILE.replace("\u202e", " ").split())
        assert browser.title == browser.find_element("tag name", "h1").text == shown
        facts = browser.find_element("id", "facts").text
        assert browser.find_element("id", "attribution").text == shown
        assert facts.count("<script>alert(1)</script>") == 3 and "\u202e" not in facts
        assert len(browser.find_elements("css selector", "script")) == 2
        assert not browser.find_elements("css selector", "img[src=x]")
        assert errors(browser) == []
    assert "license" not in (tmp_path / "site/README.md").read_text().split("---")[1]


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_it_fits_phones_and_desks(toy_page: Path, browser: Any, width: int, scheme: str) -> None:
    with served(toy_page) as address:
        set_device(browser, width, 844, scheme)
        browser.get(address)
        wait_until_shown(browser, "0/")
        sizes = browser.execute_script("return [document.documentElement.scrollWidth, window.innerWidth]")
        assert sizes[0] <= sizes[1] == width
        style = "const style = getComputedStyle(document.body); return [style.color, style.backgroundColor]"
        text, ground = (sum(map(int, re.findall(r"\d+", found)[:3])) for found in browser.execute_script(style))
        assert (text > ground) == (scheme == "dark") and abs(text - ground) > 500


def test_a_page_that_is_opened_as_a_file_says_how_to_serve_it(toy_page: Path, browser: Any) -> None:
    browser.get(toy_page.joinpath("index.html").as_uri())
    notice = browser.find_element("id", "unserved")
    assert notice.is_displayed() and "python -m http.server" in notice.text
    assert not browser.find_element("id", "sample").is_displayed()


def test_the_pinned_runtime_is_the_published_one(tmp_path: Path) -> None:
    folder = require_browser()
    assert json.loads((folder / "package.json").read_text())["version"] == VERSION
    for webgpu in (False, True):
        pinned, copied = Runtime.of(webgpu), Runtime.copied(folder, webgpu, tmp_path)
        assert pinned.module.startswith("https://") and pinned.module.endswith(copied.module.removeprefix("./runtime/"))
        assert pinned.wasm.endswith(copied.wasm.removeprefix("./runtime/"))
        hashes = [(runtime.module_integrity, runtime.wasm_integrity) for runtime in (pinned, copied)]
        assert hashes[0] == hashes[1]


def test_without_a_copy_the_page_names_the_pinned_runtime(invoke: Invoke, home: Path) -> None:
    result = invoke(page_command, home / "runs/toy", "--out", "site")
    assert result.exit_code == 0, result.output
    page, runtime = Path("site/index.html").read_text(), Runtime.of(webgpu=False)
    (policy,) = re.findall(r'Content-Security-Policy" content="([^"]*)"', page)
    rules = dict(rule.split(" ", 1) for rule in policy.split("; "))
    assert rules["default-src"] == "'none'" and rules["connect-src"] == f"'self' {runtime.wasm}"
    assert rules["script-src"].endswith(f"'wasm-unsafe-eval' {runtime.module}") and "unsafe-inline" not in policy
    imports = json.loads(re.findall(r'importmap">(.*?)</script>', page)[0])
    assert imports["integrity"] == {imports["imports"]["onnxruntime-web"]: runtime.module_integrity}
    data = json.loads(Path("site/page.json").read_text())
    assert data["runtime"] == {"wasm": runtime.wasm, "integrity": runtime.wasm_integrity}
    assert data["teacher"] is None and not Path("site/runtime").exists()


def test_the_pages_commands_run(invoke: Invoke, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """docs/page.md, on small students, with a Hub of our own."""
    shutil.copytree(home / "runs/toy", tmp_path / "runs/digits")
    shutil.copytree(home / "cache/toy.zarr", tmp_path / "cache/digits.zarr")
    (tmp_path / "node_modules").mkdir()
    (tmp_path / "node_modules/onnxruntime-web").symlink_to(require_browser())
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    commands = list(itertools.chain(*shell_blocks(PAGE)))
    with model_hub(tmp_path / "hub") as (address, _):
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", address)
        for command in commands:
            name, *arguments = shlex.split(command)
            if name == "advkd-page" and "--serve" not in arguments:
                result = invoke(page_command, *arguments)
                assert result.exit_code == 0, f"{command}: {result.output}"
    assert Path("site/runtime").is_dir() and Path("hub/spaces/me/digits/page.json").is_file()
    assert {command.split()[0] for command in commands} == {"advkd-page", "npm"}
    assert "--serve" in commands[0]


def test_serve_answers_until_ctrl_c(home: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", "from advkd.pipeline.cli.page import main; main()", home / "runs/toy"]
    with subprocess.Popen(
        [*command, "--out", tmp_path / "site", "--serve", "--port", "0"], stdout=subprocess.PIPE, text=True
    ) as process:
        lines = iter(process.stdout or [])
        address = next(line for line in lines if line.startswith("http://")).split()[0]
        with urllib.request.urlopen(f"{address}page.js", timeout=10) as answer:
            assert answer.headers["Content-Type"] == "text/javascript" and b"Sheet" in answer.read()
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 0


def test_mistakes_cost_a_line(invoke: Invoke, home: Path) -> None:
    run = home / "runs/toy"
    Path("mine").mkdir()
    Path("mine/thesis.txt").write_text("years")
    write_store(Path("other.zarr"), "0:64", noise={"rule": "philox4x64-as241-v1", "root_seed": 1})
    for arguments, message, code in (
        ([run, "--out", "mine"], "mine holds something other than an earlier page", 2),
        ([run, "--out", "mine/thesis.txt"], "is a file: give a folder", 2),
        ([run, "--out", "site", "--runtime", "mine"], "no ort.wasm.bundle.min.mjs; expected an unpacked npm", 2),
        ([run, "--out", "site", "--port", "80"], "--port is of --serve", 2),
        ([run, "--out", "site", "--cache", "other.zarr"], "give the cache that it was trained from", 2),
        ([home / "runs/none", "--out", "site"], "no student in", 1),
    ):
        result = invoke(page_command, *arguments)
        assert result.exit_code == code and message in result.output, result.output
        assert result.output.count("\n") == 1
    assert [path.name for path in Path("mine").iterdir()] == ["thesis.txt"]
