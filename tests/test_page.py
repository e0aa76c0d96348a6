"""The page: it says what plans and certificates say, is text throughout, fetches nothing, and works in a browser."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters import contents, write_adapter

import para_ext
from para_ext import cli
from para_ext.charts import KEEPS, RankMap
from para_ext.errors import ParaError
from para_ext.naming import place
from para_ext.report import at_most, megabytes, percent, span
from para_ext.spectra import ModuleSpectrum, Spectra

pytest.importorskip("plotly", reason="plotly is not installed")
from para_ext.page import write_page

HOSTILE = "</script><img src=x onerror=alert(1)>"


class _Page(HTMLParser):
    """The elements of a page, and the text of its scripts."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))
        self.document: dict[str, Any] = json.loads(self.scripts[0])

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "script":
            self.scripts.append("")

    def handle_data(self, data: str) -> None:
        if self.cdata_elem == "script":
            self.scripts[-1] += data

    def stop(self, origin: str) -> dict[str, Any]:
        (found,) = (stop for stop in self.document["stops"] if stop["origin"] == origin)
        return found


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    return write_adapter(tmp_path / "adapter")


def test_plans_are_those_of_compress(adapter: Path, tmp_path: Path) -> None:
    write_page(tmp_path / "report.html", adapter)
    page = _Page(tmp_path / "report.html")
    spectra = para_ext.decompose(adapter).spectra
    assert [module["sigma"] for module in page.document["modules"]] == [list(m.sigma) for m in spectra.modules]
    budgets: dict[str, dict[str, Any]] = {f"--keep {k:g}%": {"keep": f"{k:g}%"} for k in KEEPS if k >= 3}
    for origin, budget in {**budgets, "--energy 0.95": {}}.items():
        stop, plan = page.stop(origin), spectra.plan(**budget)
        assert stop["ranks"] == list(plan.ranks.values())
        report = para_ext.compress_adapter(adapter, tmp_path / "small", dry_run=True, **budget)
        assert stop["ranks"] == list(report.ranks.values())
        assert report.bytes_after is not None
        dropped = stop["ranks"].count(0)
        assert stop["words"] == {
            "ranks": span(stop["ranks"]) + (f" ({dropped} dropped)" if dropped else ""),
            "parameters": f"{plan.parameters_after:,} ({plan.parameters_after / plan.parameters_before:.1%})",
            "energy": percent(plan.energy),
            "error": at_most(plan.error / spectra.energy**0.5),
            "bytes": megabytes(report.bytes_after),
        }
    knee = para_ext.compress_adapter(adapter, tmp_path / "small", dry_run=True, auto="knee")
    assert page.stop("--auto knee")["ranks"] == list(knee.ranks.values())
    sizes = [stop["size"] for stop in page.document["stops"]]
    assert sizes == sorted(sizes)
    assert page.document["stops"][page.document["start"]]["origin"] == "--energy 0.95"


def test_certificates(adapter: Path, tmp_path: Path) -> None:
    report = para_ext.compress_adapter(adapter, tmp_path / "small", keep=0.4)
    para_ext.compress_adapter(adapter, tmp_path / "other", keep=0.3)
    (tmp_path / "other" / "para_ext.json").unlink()
    write_page(tmp_path / "report.html", adapter, [tmp_path / "small", tmp_path / "other", report])
    page = _Page(tmp_path / "report.html")
    small, again = (stop for stop in page.document["stops"] if stop["origin"] == "as certified when it was written")
    assert small == again
    assert small["name"] == str(tmp_path / "small")
    assert small["ranks"] == list(report.ranks.values())
    assert small["errors"] == [m.error for m in report.modules]
    assert small["words"]["error"] == at_most(report.relative_error)
    assert small["words"]["energy"] == percent(report.energy)
    other, found = page.stop("measured on the files"), para_ext.verify(adapter, tmp_path / "other")
    assert (other["errors"], other["energies"]) == ([m.error for m in found.modules], [m.energy for m in found.modules])
    assert other["words"]["bytes"] == megabytes((tmp_path / "other" / "adapter_model.safetensors").stat().st_size)
    assert page.document["start"] == page.document["stops"].index(other)  # the smallest that was made


def test_a_certificate_of_another_adapter_is_not_believed(adapter: Path, tmp_path: Path) -> None:
    other = write_adapter(tmp_path / "trained further")
    tensors = para_ext.decompose(other)
    para_ext.compress_adapter(adapter, tmp_path / "small", keep=0.4)
    sidecar = tmp_path / "small" / "para_ext.json"
    record = json.loads(sidecar.read_text())
    record["modules"][0]["sigma_max"] *= 1.01
    sidecar.write_text(json.dumps(record))
    write_page(tmp_path / "report.html", adapter, [tmp_path / "small"])
    assert _Page(tmp_path / "report.html").stop("measured on the files")
    tensors.spectra.save(tmp_path / "spectra.json")
    with pytest.raises(ParaError, match="must be measured: give the adapter itself"):
        write_page(tmp_path / "other.html", tmp_path / "spectra.json", [tmp_path / "small"])


@pytest.mark.parametrize(
    "damage",
    [
        {"modules": 0},
        {"predicted": 1},
        {"bytes_after": "x"},
        {"error": float("inf")},
        {"error": "x"},
        {"rank_after": -1},
    ],
    ids=str,
)
def test_a_damaged_certificate_is_refused(adapter: Path, tmp_path: Path, damage: dict[str, Any]) -> None:
    para_ext.compress_adapter(adapter, tmp_path / "small", keep=0.4)
    sidecar = tmp_path / "small" / "para_ext.json"
    record = json.loads(sidecar.read_text())
    (record if damage.keys() <= record.keys() - {"error"} else record["modules"][3]).update(damage)
    sidecar.write_text(json.dumps(record))
    with pytest.raises(ParaError, match=r"the certificate of .* is damaged, compress again"):
        write_page(tmp_path / "report.html", adapter, [tmp_path / "small"])
    assert not (tmp_path / "report.html").exists()


def test_spectra_serve_as_the_adapter(adapter: Path, tmp_path: Path) -> None:
    spectra = para_ext.decompose(adapter).spectra
    spectra.save(tmp_path / "adapter.json")
    para_ext.compress_adapter(adapter, tmp_path / "small", keep=0.4)
    write_page(tmp_path / "a.html", tmp_path / "adapter.json", [tmp_path / "small"])
    write_page(tmp_path / "b.html", spectra, [tmp_path / "small"], title="adapter")
    write_page(tmp_path / "c.html", adapter, [tmp_path / "small"])
    pages = [(tmp_path / f"{name}.html").read_bytes() for name in "abc"]
    assert pages[0] == pages[1] == pages[2]


def test_mlx_plans_have_the_one_rank_that_its_files_need(tmp_path: Path) -> None:
    source = write_adapter(tmp_path / "adapter", [(n, B, A) for n, B, A in _layers(4)])
    para_ext.convert_adapter(source, tmp_path / "mlx", "mlx")
    write_page(tmp_path / "report.html", tmp_path / "mlx")
    for stop in _Page(tmp_path / "report.html").document["stops"]:
        assert len(set(stop["ranks"])) == 1


def _layers(rank: int) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    for i in range(2):
        for name in ("self_attn.q_proj", "self_attn.v_proj"):
            B, A = (torch.randn(shape, generator=generator) for shape in ((32, rank), (rank, 32)))
            yield f"model.layers.{i}.{name}", B, A


@pytest.mark.parametrize("sigma", [(0.0, 0.0), (1.0, 0.0)], ids=["all zero", "one component"])
def test_few_components(tmp_path: Path, sigma: tuple[float, ...]) -> None:
    write_page(tmp_path / "report.html", Spectra((ModuleSpectrum("a", 4, 4, 2, sigma),)))
    assert _Page(tmp_path / "report.html").document["stops"][-1]["words"]["energy"] == "100.00%"


def test_names_are_text(tmp_path: Path) -> None:
    names = [HOSTILE, "{{plotly}}", "<!--<script>", "\u2028&amp;", "layers.0.$x$"]
    spectra = Spectra(tuple(ModuleSpectrum(name, 4, 4, 2, (2.0, 1.0)) for name in names))
    write_page(tmp_path / "plain.html", Spectra((ModuleSpectrum("a", 4, 4, 2, (2.0, 1.0)),)))
    write_page(tmp_path / "report.html", spectra, title=HOSTILE)
    plain, page = _Page(tmp_path / "plain.html"), _Page(tmp_path / "report.html")
    assert [module["name"] for module in page.document["modules"]] == names
    assert [tag for tag, _ in page.tags] == [tag for tag, _ in plain.tags]
    assert page.scripts[1:] == plain.scripts[1:]


def test_nothing_is_fetched(adapter: Path, tmp_path: Path) -> None:
    write_page(tmp_path / "report.html", adapter)
    page = _Page(tmp_path / "report.html")
    assert len(page.scripts) == 3
    loaded = [(tag, value) for tag, attributes in page.tags for name, value in attributes.items()
              if name in ("src", "href", "srcset", "data", "action", "poster")]  # fmt: skip
    assert loaded == [("link", "data:,")]
    (policy,) = (a["content"] for t, a in page.tags if t == "meta" and a.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None and policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "http" not in policy and "unsafe-eval" not in policy
    own = (tmp_path / "report.html").read_text(encoding="utf-8").replace(page.scripts[1], "")
    assert not re.search(r"https?:|url\(|@import", own)


def test_the_file_is_new_and_outside(adapter: Path, tmp_path: Path) -> None:
    before = contents(tmp_path)
    with pytest.raises(ParaError, match="lies inside an adapter"):
        write_page(adapter / "report.html", adapter)
    with pytest.raises(ParaError, match="is not a folder that can be written to"):
        write_page(tmp_path / "nowhere" / "report.html", adapter)
    with pytest.raises(ParaError, match="is a folder"):
        (tmp_path / "folder").mkdir()
        write_page(tmp_path / "folder", adapter, overwrite=True)
    assert contents(tmp_path) == before
    out = tmp_path / "report.html"
    out.write_text("mine")
    with pytest.raises(ParaError, match="exists: give another out=, or overwrite=True"):
        write_page(out, adapter)
    assert out.read_text() == "mine"
    write_page(out, adapter, overwrite=True)
    assert out.read_text(encoding="utf-8").startswith("<!doctype html>")


def test_command(
    adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "report.html"
    monkeypatch.setattr(sys, "argv", ["para-ext", "report", str(adapter), "-o", str(out), "--title", "A & B", "--json"])
    cli.main()
    document = json.loads(capsys.readouterr().out)
    assert (document["output"], document["bytes"]) == (str(out), out.stat().st_size)
    assert "<title>A &amp; B</title>" in out.read_text(encoding="utf-8")


def test_plotly_missing_is_said_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "plotly.offline", None)
    with pytest.raises(ParaError, match=r"needs plotly; install para_ext\[report\]"):
        write_page(tmp_path / "report.html", tmp_path / "no adapter")


def test_map_has_a_cell_for_every_module() -> None:
    names = ["model.layers.10.self_attn.q_proj", "model.layers.2.self_attn.q_proj", "model.layers.2.mlp.up", "lm_head"]
    map_ = RankMap.of(names)
    assert map_.layers == ("", "model.layers.2", "model.layers.10")
    assert map_.kinds == ("self_attn.q_proj", "mlp.up", "lm_head")
    assert map_.cells == ((2, 0), (1, 0), (1, 1), (0, 2))
    assert RankMap.of(names[:3]).labels == ("2", "10")


@pytest.mark.parametrize(
    ("name", "layer", "kind"),
    [
        ("model.decoder.layers.0.encoder_attn.q_proj", "model.decoder.layers.0", "encoder_attn.q_proj"),
        ("mid_block.attentions.0.blocks.1.attn1.to_out.0", "mid_block.attentions.0.blocks.1", "attn1.to_out.0"),
        ("lora_unet_down_blocks_0_attentions_1_proj_in", "lora_unet_down_blocks_0_attentions_1", "proj_in"),
        ("encoder.q_proj", "encoder", "q_proj"),
        ("unet.17", "unet.17", "unet"),
        ("lm_head", "", "lm_head"),
    ],
)
def test_place(name: str, layer: str, kind: str) -> None:
    assert place(name) == (layer, kind)


# In a browser


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Headless Chromium from the system, whose console is kept."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    chromium, driver = (shutil.which(name) for name in ("chromium", "chromedriver"))
    if chromium is None or driver is None:
        pytest.skip("chromium and chromedriver are not installed")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    flags = "headless no-sandbox disable-gpu disable-quic no-first-run disable-background-networking "
    flags += "disable-component-update disable-sync window-size=1280,900"
    for flag in (*flags.split(), f"user-data-dir={tmp_path_factory.mktemp('chromium')}"):
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    service = webdriver.ChromeService(driver, log_output=subprocess.DEVNULL)
    with webdriver.Chrome(options=options, service=service) as opened:
        yield opened


@pytest.fixture
def opened(browser: Any) -> Iterator[Callable[[Path], Any]]:
    """Opens a page; afterwards its console must be empty, and nothing may have been fetched."""

    def open_(path: Path) -> Any:
        browser.get(path.as_uri())
        return browser

    yield open_
    assert browser.get_log("browser") == []
    assert browser.execute_script("return performance.getEntriesByType('resource').map(e => e.name)") == []


def _text(browser: Any, id: str) -> str:
    return str(browser.execute_script("return document.getElementById(arguments[0]).textContent", id))


def _column(browser: Any, number: int) -> list[str]:
    script = "return [...document.querySelectorAll('tbody tr')].map(row => row.cells[arguments[0]].textContent)"
    return list(browser.execute_script(script, number))


def _move(browser: Any, stop: int) -> None:
    browser.execute_async_script(
        "const [stop, done] = arguments, slider = document.getElementById('slider'); slider.value = stop;"
        "slider.dispatchEvent(new Event('input')); requestAnimationFrame(() => requestAnimationFrame(done));",
        stop,
    )


def test_slider(adapter: Path, tmp_path: Path, opened: Callable[[Path], Any]) -> None:
    write_page(tmp_path / "report.html", adapter)
    page, browser = _Page(tmp_path / "report.html"), opened(tmp_path / "report.html")
    spectra = para_ext.decompose(adapter).spectra
    assert _text(browser, "origin") == "--energy 0.95"
    for keep in ("10%", "50%", "100%"):
        _move(browser, page.document["stops"].index(page.stop(f"--keep {keep}")))
        plan = spectra.plan(keep=keep)
        report = para_ext.compress_adapter(adapter, tmp_path / "small", keep=keep, dry_run=True)
        assert _text(browser, "origin") == f"--keep {keep}"
        assert _text(browser, "energy") == percent(plan.energy)
        assert _text(browser, "parameters").startswith(f"{plan.parameters_after:,} ")
        assert _column(browser, 4) == [str(rank) for rank in plan.ranks.values()]
        assert _column(browser, 6) == [at_most(e) if e else "0" for e in plan.errors.values()]
        assert _column(browser, 8) == [percent(m.energy) for m in report.modules]
        drawn = browser.execute_script("return document.getElementById('map').data[0].text")
        cells = RankMap.of(list(plan.ranks)).cells
        assert [drawn[kind][layer] for layer, kind in cells] == list(plan.ranks.values())
        counts = browser.execute_script("return document.getElementById('histogram').data[0].y")
        assert counts == [list(plan.ranks.values()).count(rank) for rank in range(len(counts))]
    browser.find_element("css selector", "#named button").click()
    assert _text(browser, "origin") == "--auto knee"


def test_certificate_in_the_table(adapter: Path, tmp_path: Path, opened: Callable[[Path], Any]) -> None:
    report = para_ext.compress_adapter(adapter, tmp_path / "small", keep=0.4)
    write_page(tmp_path / "report.html", adapter, [report])
    browser = opened(tmp_path / "report.html")
    assert _text(browser, "heading") == "Certificate"
    assert _column(browser, 6) == [at_most(m.error) for m in report.modules]
    assert _text(browser, "error") == at_most(report.relative_error)


def test_table_sorts(adapter: Path, tmp_path: Path, opened: Callable[[Path], Any]) -> None:
    write_page(tmp_path / "report.html", adapter)
    browser = opened(tmp_path / "report.html")
    spectra = para_ext.decompose(adapter).spectra
    sigma, module = (browser.find_element("css selector", f"th[data-key={key}]") for key in ("sigma", "name"))
    by_sigma = [m.name for m in sorted(spectra.modules, key=lambda m: m.sigma[0])]
    button = sigma.find_element("tag name", "button")
    button.click()
    assert _column(browser, 0) == by_sigma[::-1]
    assert sigma.get_attribute("aria-sort") == "descending"
    button.click()
    assert _column(browser, 0) == by_sigma
    module.find_element("tag name", "button").click()
    assert _column(browser, 0) == sorted(m.name for m in spectra.modules)
    assert sigma.get_attribute("aria-sort") is None


def test_selected_module_is_drawn(adapter: Path, tmp_path: Path, opened: Callable[[Path], Any]) -> None:
    write_page(tmp_path / "report.html", adapter)
    browser = opened(tmp_path / "report.html")
    before = browser.execute_script("return document.getElementById('spectra').data.length")
    browser.find_element("css selector", "tbody button").click()
    drawn = browser.execute_script("return document.getElementById('spectra').data")
    assert len(drawn) == before + 1
    assert drawn[-1]["y"] == pytest.approx(para_ext.decompose(adapter).spectra.modules[0].sigma)


def test_hostile_names_do_nothing(tmp_path: Path, opened: Callable[[Path], Any]) -> None:
    names = [
        HOSTILE,
        "layers.0.<b>bold</b><img src=x onerror=alert(2)>",
        "layers.1.<a href='javascript:alert(3)'>x</a>",
    ]
    write_page(
        tmp_path / "report.html",
        Spectra(tuple(ModuleSpectrum(name, 4, 4, 2, (2.0, 1.0)) for name in names)),
        title=HOSTILE,
    )
    browser = opened(tmp_path / "report.html")
    assert _column(browser, 0) == names
    assert browser.execute_script("return document.querySelectorAll('img, a').length") == 0
    assert browser.title == HOSTILE
    drawn = browser.execute_script("return [...document.querySelectorAll('svg text')].map(text => text.textContent)")
    assert names[0] in drawn or any("onerror" in text for text in drawn)  # as text


def test_narrow_screens_do_not_scroll_sideways(adapter: Path, tmp_path: Path, opened: Callable[[Path], Any]) -> None:
    write_page(tmp_path / "report.html", adapter, [para_ext.compress_adapter(adapter, tmp_path / "small", keep=0.4)])
    browser = opened(tmp_path / "report.html")
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride", {"width": 390, "height": 844, "deviceScaleFactor": 1, "mobile": True}
    )
    # Plots are drawn anew at the new width, which takes a moment.
    for _ in range(100):
        if (width := browser.execute_script("return document.documentElement.scrollWidth")) <= 390:
            break
        time.sleep(0.1)
    assert width <= 390
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
