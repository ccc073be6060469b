"""Pages on trainings: whole, safe, and as a browser draws them."""

import re
import shutil
import subprocess
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from support.records import make_record

from hf_freezecache.reporting.charts import COLOURS, draw_run
from hf_freezecache.reporting.page import common_metric, make_comparison, make_page

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


def test_page_tells_what_the_training_did():
    page = make_page(make_record())
    for words in ("Built the store.", "Speed-up", "1.14 x", "2 of 3 blocks", "1 of 2 epochs", "codec", "Accuracy"):
        assert words in page
    assert page.count("<svg") == 6


def test_page_needs_nothing_from_elsewhere():
    page = make_page(make_record())
    assert "<script" not in page and "<link" not in page and "@import" not in page
    addresses = set(re.findall(r"https?://[^\s\"'<]+", page))
    assert addresses <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}
    # Every colour of a chart is the page's, so that it follows the reader's scheme.
    charts = "".join(re.findall(r"<svg.*?</svg>", page, re.DOTALL))
    assert not any(colour in charts.lower() for colour in COLOURS.values())


def test_what_others_have_written_is_text():
    record = make_record()
    hostile = "<script>alert(1)</script>"
    run = {**record.run, "name": hostile, "settings": {hostile: hostile}, "model": hostile}
    notes = [{"seconds": 0.0, "epoch": 0, "text": hostile}]
    page = make_page(replace(record, run=run, notes=notes, blocks=[hostile], store={hostile: hostile}))
    assert "<script" not in page
    assert "<script" not in make_comparison([(hostile, record), ("other", record)])


@pytest.mark.parametrize("name", ["cost of $x^$", "_first", "\\frac$", "half \udcff"])
def test_names_are_drawn_as_they_are(name, tmp_path):
    record = make_record(run={"name": name})
    draw_run(record, tmp_path / "run.png")
    logs = [{f"eval_{name}": 0.5, "seconds": 1.0, "epoch": 1.0}]
    chart = re.search(r"<svg.*?</svg>", make_comparison([(name, make_record(logs=logs))]), re.DOTALL)
    assert name.encode("utf-8", "replace").decode() in chart[0]


@pytest.mark.parametrize("style", [{"text.usetex": True}, {"font.size": 40.0}])
def test_pictures_do_not_depend_on_the_style_of_the_user(style, tmp_path):
    import matplotlib

    for name, settings in (("plain", {}), ("styled", style)):
        with matplotlib.rc_context(settings):
            draw_run(make_record(), tmp_path / f"{name}.png")
    assert (tmp_path / "plain.png").read_bytes() == (tmp_path / "styled.png").read_bytes()


def test_training_that_has_logged_nothing_has_a_page():
    record = make_record(logs=[], epochs=[], phases=[], notes=[], totals={}, plain_estimate={}, store=None)
    assert "0 of 3 blocks" in make_page(record)


def test_trainings_are_compared_by_the_metric_that_all_have():
    first, second = make_record(), make_record(run={"name": "second"})
    page = make_comparison([("first", first), ("second", second)])
    assert "Accuracy, last" in page and "2 of 3" in page
    without = make_record(logs=[{"loss": 1.0, "seconds": 1.0, "epoch": 1.0}])
    assert "Loss, last" in make_comparison([("first", first), ("without", without)])
    both = {"eval_f1": 0.7, "seconds": 1.0, "epoch": 1.0}
    assert common_metric([make_record(logs=[*first.logs, both]), make_record(logs=[both])]) == "eval_f1"
    with pytest.raises(ValueError, match="no training has logged 'eval_f1'"):
        make_comparison([("first", first)], "eval_f1")


def test_picture_shows_all_charts(tmp_path):
    draw_run(make_record(), tmp_path / "run.png")
    with Image.open(tmp_path / "run.png") as picture:
        assert picture.width > 1000 and len(set(picture.convert("RGB").resize((200, 150)).getdata())) > 20


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_browser_draws_the_page_in_the_readers_scheme(scheme, tmp_path):
    (tmp_path / "page.html").write_text(make_page(make_record()), encoding="utf-8")
    picture = tmp_path / "page.png"
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--window-size=1280,1600"]
    command += [f"--user-data-dir={tmp_path / 'profile'}", f"--screenshot={picture}"]
    command += [f"--blink-settings=preferredColorScheme={0 if scheme == 'dark' else 1}"]
    subprocess.run([*command, (tmp_path / "page.html").as_uri()], check=True, capture_output=True, timeout=120)
    with Image.open(picture) as opened:
        pixels = np.asarray(opened.convert("L"), dtype=float)
    assert (pixels.mean() < 100) == (scheme == "dark")
    # Charts are there: the middle of the page is no plain ground.
    assert pixels[300:1000].std() > 10
