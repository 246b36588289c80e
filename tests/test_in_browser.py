"""JupyterLab as a reader sees it, in Chromium; ``make browser-test``.

``make lab`` is started in folders of its own, and Playwright clicks and types. Screenshots are
kept in ``build/screenshots``. The notebooks share the runs of recipe ``pocket``, so that 06 finds
the model of 05.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path
from types import SimpleNamespace

import nbformat
import pytest
from test_chat_command import FRANCE, HELLO, taught_to_chat

from tinytrain.callbacks import read_history

pytestmark = [pytest.mark.browser, pytest.mark.timeout(1800)]

ROOT = Path(__file__).parent.parent
SCREENSHOTS = ROOT / "build" / "screenshots"
MINUTE = 60_000  # Playwright counts in milliseconds


def checkout():
    command = ["git", "status", "--porcelain"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout


def write_json(path, values):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(values), encoding="utf-8")


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """``make lab``, with nothing of this user's settings; ``url``, ``token`` and ``runs``."""
    folder = tmp_path_factory.mktemp("lab")
    before = checkout()
    write_json(
        folder / "config" / "jupyter_server_config.json", {"ServerApp": {"open_browser": False}}
    )
    settings = folder / "config" / "lab" / "user-settings" / "@jupyterlab" / "apputils-extension"
    write_json(settings / "notification.jupyterlab-settings", {"fetchNews": "false"})
    environment = os.environ | {
        "JUPYTER_CONFIG_DIR": str(folder / "config"),
        "JUPYTER_DATA_DIR": str(folder / "data"),
        "JUPYTER_RUNTIME_DIR": str(folder / "runtime"),
        "IPYTHONDIR": str(folder / "ipython"),
        "TINYTRAIN_RUNS": str(folder / "runs"),
        "TINYTRAIN_RECIPE": "pocket",
        "TINYTRAIN_MAX_STEPS": "200",
    }
    log = folder / "lab.log"
    with log.open("w") as file:
        server = subprocess.Popen(
            ["make", "lab"],
            cwd=ROOT,
            env=environment,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        deadline = time.monotonic() + 120
        while not (found := list((folder / "runtime").glob("jpserver-*.json"))):
            assert server.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.2)
        yield SimpleNamespace(**json.loads(found[0].read_text()), runs=folder / "runs")
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(60)
    assert checkout() == before, "JupyterLab has changed the checkout"


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        # Debian's, or else the one that `playwright install chromium` has fetched.
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"))
        yield browser
        browser.close()


@pytest.fixture
def page(browser, request):
    """A page without errors: neither in its console nor uncaught."""
    page = browser.new_page(viewport={"width": 1280, "height": 1100})
    page.set_default_timeout(2 * MINUTE)
    badge = {"content_type": "image/svg+xml", "body": '<svg xmlns="http://www.w3.org/2000/svg"/>'}
    page.route("https://colab.research.google.com/**", lambda route: route.fulfill(**badge))
    errors = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("console", lambda message: message.type == "error" and errors.append(message.text))
    yield page
    shoot(page, request.node.name.removeprefix("test_"))
    page.close()
    assert not errors


def shoot(page, name, what=None):
    for _ in range(2 if what else 0):  # what is drawn only now may push it out of sight again
        what.evaluate("element => element.scrollIntoView({block: 'center'})")
        page.wait_for_timeout(500)
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=SCREENSHOTS / f"{name}.png")


def menu(page, name, entry):
    page.get_by_role("menuitem", name=name, exact=True).click()
    page.get_by_role("menuitem", name=entry, exact=True).click()


def open_notebook(page, lab, name):
    """Open a notebook in a workspace of its own, without the outputs that are committed."""
    workspace = name.replace("/", "-")
    page.goto(f"{lab.url}lab/workspaces/{workspace}/tree/notebooks/{name}.ipynb?token={lab.token}")
    page.get_by_text("Python 3 (ipykernel) | Idle").wait_for()  # in the status bar
    menu(page, "Edit", "Clear Outputs of All Cells")


def headings(name):
    """Return the headings of a notebook, its title first."""
    notebook = nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", as_version=4)
    texts = [cell.source for cell in notebook.cells if cell.cell_type == "markdown"]
    return re.findall(r"^#+ (.+)", "\n".join(texts), re.MULTILINE)


def prompts(page):
    shown = page.locator(".jp-CodeCell .jp-InputArea-prompt").all_text_contents()
    return [text.strip("[]: \n") for text in shown]


def wait_for_all_cells(page, minutes):
    """Wait until every cell has run; fail at the first error."""
    errors = page.locator("[data-mime-type='application/vnd.jupyter.error']")
    deadline = time.monotonic() + 60 * minutes
    while not all(prompt.isdigit() for prompt in prompts(page)):
        assert not errors.count(), errors.first.text_content()
        assert time.monotonic() < deadline, prompts(page)
        page.wait_for_timeout(500)
    numbers = [int(prompt) for prompt in prompts(page)]
    assert numbers == list(range(1, len(numbers) + 1))


def wait_until(page, condition, seconds=120):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not so after {seconds} seconds"
        page.wait_for_timeout(100)


def wait_for_text(page, place, text):
    wait_until(page, lambda: place.inner_text() == text)


def widget(page, label):
    """Return the input with this label and the explorer that it is in."""
    control = page.locator(".jupyter-widgets.widget-inline-hbox").filter(
        has=page.locator(f".widget-label:text-is('{label}')")
    )
    return control, page.locator(".widget-vbox").filter(has=control)


def test_a_term_leads_to_the_glossary(lab, page):
    open_notebook(page, lab, "zh/01_gpu_check")
    page.locator(".jp-Notebook a", has_text="参数").first.click()
    page.get_by_role("tab", name="glossary.md").wait_for()


def test_05_trains_under_the_readers_eyes_and_stops_when_told(lab, page):
    open_notebook(page, lab, "05_train_bf16")
    menu(page, "Run", "Run All Cells")
    cell = page.locator(".jp-CodeCell", has_text="train(trainer, inputs")
    plot = cell.locator(".jp-RenderedImage img")
    plot.wait_for(timeout=10 * MINUTE)  # before it, steps by hand and counting

    folder, deadline = lab.runs / "pocket", time.monotonic() + 600
    pictures = [plot.get_attribute("src")]
    while len(pictures) < 4 or read_history(folder)[-1]["step"] < 60:
        assert cell.locator(".jp-InputArea-prompt").text_content() == "[*]:"
        assert time.monotonic() < deadline, f"only {len(pictures)} pictures in ten minutes"
        page.wait_for_timeout(100)
        if (picture := plot.get_attribute("src")) != pictures[-1]:
            pictures.append(picture)
    assert len(set(pictures)) == len(pictures) and plot.count() == 1
    shoot(page, "05_trains", cell)

    page.get_by_role("button", name="Interrupt the kernel").click()
    stopped = cell.get_by_text("by the interrupt; a checkpoint is saved")
    stopped.wait_for()
    shoot(page, "05_stopped", cell)
    step = int(re.search(r"stopped at step (\d+)", stopped.text_content())[1])
    assert 60 <= step < 200
    checkpoint = folder / "checkpoints" / f"checkpoint-{step}"
    assert (checkpoint / "model.safetensors").is_file()

    # The interrupt ends the training and nothing else: the cells below have their turn.
    wait_for_all_cells(page, minutes=10)
    assert (folder / "model" / "model.safetensors").is_file()
    cell_below = page.locator(".jp-CodeCell", has_text="right before training")
    shoot(page, "05_goes_on", cell_below)
    page.get_by_role("button", name="Save and create checkpoint").click()
    page.locator(".lm-TabBar-tab.jp-mod-dirty").wait_for(state="detached")
    saved = nbformat.read(lab.runs / "notebooks" / "05_train_bf16.ipynb", as_version=4)
    nbformat.validate(saved)
    assert "by the interrupt" in json.dumps(saved)


def test_03_shows_the_tokens_of_what_is_typed(lab, page):
    open_notebook(page, lab, "03_tokenization")
    menu(page, "Run", "Run All Cells")
    wait_for_all_cells(page, minutes=5)
    control, explorer = widget(page, "text")
    assert "spring" not in explorer.inner_text()
    shoot(page, "03_before", explorer)
    control.locator("textarea").press_sequentially("春眠不觉晓, spring")
    explorer.get_by_text("spring").first.wait_for()


def test_04_weighs_the_model_of_the_sliders(lab, page):
    open_notebook(page, lab, "04_model_config")
    menu(page, "Run", "Run All Cells")
    wait_for_all_cells(page, minutes=5)
    control, explorer = widget(page, "layers")
    picture, table = explorer.locator("img"), explorer.locator("table")
    before = picture.get_attribute("src"), table.inner_text()
    shoot(page, "04_before", explorer)
    control.get_by_role("slider").press("End")
    wait_until(page, lambda: table.inner_text() != before[1])
    wait_until(page, lambda: picture.get_attribute("src") != before[0])


def test_06_writes_on_from_a_prompt(lab, page):
    open_notebook(page, lab, "06_evaluate")
    menu(page, "Run", "Run All Cells")
    wait_for_all_cells(page, minutes=10)
    prompt, explorer = widget(page, "prompt")
    prompt.locator("textarea").fill("法国的首都是")
    write = explorer.get_by_role("button", name="Write")
    written = explorer.locator(".widget-html-content").last

    write.click()
    wait_until(page, lambda: re.match("法国的首都是.", written.inner_text()))
    wait_until(page, write.is_enabled)
    sampled = written.inner_text()
    shoot(page, "06_sampled", explorer)
    widget(page, "temperature")[0].get_by_role("slider").press("Home")  # the likeliest token always
    write.click()
    wait_until(page, lambda: written.inner_text() not in (sampled, "", "法国的首都是"))
    wait_until(page, write.is_enabled)
    assert written.inner_text().startswith("法国的首都是")


CHAT = """\
from transformers import AutoModelForCausalLM, AutoTokenizer

from tinytrain import widgets

kinds = AutoModelForCausalLM, AutoTokenizer
widgets.chat_box(*(kind.from_pretrained(FOLDER) for kind in kinds), questions=["你好"])"""


def test_the_chat_box_answers_what_is_typed_and_starts_over(lab, page):
    hostile = ("<img src=x onerror=alert(1)>", "<b onclick=alert(2)>\n&lt;")
    for each in taught_to_chat(more=[hostile]):
        each.save_pretrained(lab.runs / "tuned")
    cell = nbformat.v4.new_code_cell(CHAT.replace("FOLDER", repr(str(lab.runs / "tuned"))))
    kernel = {"name": "python3", "display_name": "Python 3 (ipykernel)"}
    notebook = nbformat.v4.new_notebook(cells=[cell], metadata={"kernelspec": kernel})
    nbformat.write(notebook, lab.runs / "notebooks" / "chat_box.ipynb")
    open_notebook(page, lab, "chat_box")
    menu(page, "Run", "Run All Cells")
    send = page.get_by_role("button", name="Send")
    send.wait_for()
    box = page.locator(".widget-vbox").filter(has=send)
    field, shown = box.locator("input[type=text]"), box.locator(".widget-html-content").first
    watch = """element => {
        window.seen = []
        const look = () => window.seen.push(element.innerText)
        new MutationObserver(look).observe(element, {childList: true, subtree: true})
    }"""
    shown.evaluate(watch)

    said = []
    for question, answer in (FRANCE, HELLO, hostile):
        field.press_sequentially(question)
        field.press("Enter")
        said += [question, answer]
        wait_for_text(page, shown, "\n".join(said))
        wait_until(page, send.is_enabled)
        assert field.input_value() == ""
    seen = page.evaluate("window.seen")
    parts = [text for text in seen if text.startswith(f"{FRANCE[0]}\n") and "你好" not in text]
    assert len(set(parts)) > 1  # it was written while one watched
    assert shown.locator("img, b").count() == 0
    shoot(page, "chat_box", box)

    box.get_by_role("button", name="Start over").click()
    wait_for_text(page, shown, "")
    box.get_by_role("button", name=HELLO[0]).click()
    wait_for_text(page, shown, "\n".join(HELLO))


def test_the_chinese_edition_runs_and_leads_to_the_english_one(lab, page):
    chinese, english = (headings(f"{folder}02_data_split") for folder in ("zh/", ""))
    open_notebook(page, lab, "zh/02_data_split")
    shoot(page, "zh_02_title", page.get_by_role("heading", name=chinese[0]))
    menu(page, "Run", "Run All Cells")
    wait_for_all_cells(page, minutes=5)
    shoot(page, "zh_02_near_duplicates", page.get_by_role("heading", name=chinese[4]))
    page.get_by_role("link", name="English").click()
    page.get_by_role("heading", name=english[0]).wait_for()
