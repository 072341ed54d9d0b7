"""Promises of the app, in a real browser: one page for everyone, nobody's pictures mixed, nothing else reachable."""

from __future__ import annotations

import json
import re
import signal
import time
import urllib.error
import urllib.request

import pytest
from driving import Widget

expect = pytest.importorskip("playwright.sync_api").expect
pytestmark = [pytest.mark.browser, pytest.mark.xdist_group("browser")]


@pytest.fixture(scope="module")
def visitor(app, open_page) -> Widget:
    """The page as its first visitor sees it, open for all tests: each visitor costs a kernel."""
    begun = time.monotonic()
    page = open_page(app.url)
    widget = Widget(page, page.locator("body"))
    widget.seconds = time.monotonic() - begun
    return widget


@pytest.fixture
def widget(visitor, photograph) -> Widget:
    """The same page, as it is for a new visitor."""
    photograph.append(visitor.page)
    for label, line in (
        ("Class", "all classes"),
        ("Order", "as stored"),
        ("A picture that is not square", "is cut to its middle"),
    ):
        visitor.list(label).select_option(line)
    visitor.list("Heat map").uncheck()
    for number in (2, 1):  # one after the other: a list sends its second choice only once the first has been answered
        visitor.list("Sample image").select_option(index=number)
        expect(visitor.root.get_by_alt_text(re.compile(f"^sample {number}: .*as given"))).to_be_visible()
    expect(visitor.answers_of("")).to_have_count(0)
    return visitor


def test_the_page_is_usable_soon_and_answers(visitor, photograph):
    photograph.append(visitor.page)
    print(f"the widget stood after {visitor.seconds:.1f} s")
    assert visitor.seconds < 20  # a machine may be busy; how long it takes on an idle one is measured elsewhere
    visitor.button("Predict").click()
    expect(visitor.status).to_contain_text("sample 1: ship (test image 73): predicted")
    assert visitor.page.errors == []


def test_a_picture_is_uploaded_and_answered(widget, pictures):
    widget.upload(pictures["wide.jpg"])
    expect(widget.root.get_by_alt_text("wide.jpg, as given")).to_be_visible()
    expect(widget.root).to_contain_text("as given, 480 x 320 pixels")
    widget.button("Predict").click()
    expect(widget.status).to_contain_text("wide.jpg: predicted truck")
    widget.list("A picture that is not square").select_option("is shown whole, with black borders")
    expect(widget.root).to_contain_text("whole with black borders")
    expect(widget.answers_of("wide.jpg")).to_have_count(0)
    widget.button("Predict").click()
    expect(widget.status).to_contain_text("wide.jpg: predicted")


def test_several_pictures_are_uploaded_at_once(widget, pictures):
    widget.upload(pictures["truck.png"], pictures["notes.png"], pictures["clear.png"])
    expect(widget.list("Uploaded picture")).to_be_visible()
    widget.button("Predict").click()
    expect(widget.status).to_contain_text("truck.png: predicted truck")
    rows = widget.root.get_by_role("table").last.get_by_role("row")
    expect(rows).to_have_count(4)
    expect(rows.nth(2)).to_contain_text("not a picture that can be read")
    widget.list("Uploaded picture").select_option("3: clear.png")
    expect(widget.status).to_contain_text("clear.png: predicted")
    expect(widget.root).to_contain_text("transparent parts shown on white")


def test_a_wrong_and_a_too_large_file_are_told_and_leave_no_answer(widget, pictures):
    widget.button("Predict").click()
    expect(widget.status).to_contain_text("predicted")
    widget.upload(pictures["notes.png"])
    expect(widget.alert).to_contain_text("Error: notes.png: not a picture that can be read here")
    expect(widget.answers_of("")).to_have_count(0)
    widget.upload(pictures["large.png"])
    expect(widget.alert).to_contain_text("Error: large.png: 11.0 MiB; at most 10 MiB are allowed")
    widget.upload(pictures["truck.png"])
    expect(widget.alert).to_have_count(0)
    widget.button("Predict").click()
    expect(widget.status).to_contain_text("truck.png: predicted truck")


def test_the_gallery_is_browsed_by_class_chance_and_mistakes(widget):
    widget.thumbnail(4).click()
    expect(widget.thumbnail(4)).to_have_text(re.compile("^✓"))
    expect(widget.root).to_contain_text("sample 4: ")
    assert "data:image/png" in widget.thumbnail(4).evaluate("e => getComputedStyle(e).backgroundImage")
    widget.button("Next pictures").click()
    expect(widget.root).to_contain_text("pictures 21 to 40 of 200")
    widget.list("Class").select_option("frog")
    expect(widget.root).to_contain_text("pictures 1 to 20 of 20")
    widget.list("Class").select_option("all classes")
    widget.list("Order").select_option("most confident mistakes first")
    expect(widget.list("Sample image")).to_contain_text("taken for")
    widget.list("Sample image").select_option(index=1)
    widget.button("Predict").click()
    expect(widget.status).to_contain_text("wrong")
    widget.button("Draw others at random").click()
    expect(widget.list("Order")).to_have_value(re.compile("^at.random$"))


def test_the_language_is_switched_with_the_answer_on_the_page(widget):
    widget.button("Predict").click()
    expect(widget.status).to_contain_text("predicted")
    widget.list("Language").select_option("français")
    expect(widget.button("Prédire")).to_be_visible()
    expect(widget.status).to_contain_text("prédiction")
    expect(widget.root).to_contain_text("grenouille")
    expect(widget.root).not_to_contain_text("Sample image")
    widget.list("Langue").select_option("English")
    expect(widget.button("Predict")).to_be_visible()


def test_a_heat_map_is_shown_on_demand(widget):
    widget.button("Predict").click()
    widget.list("Heat map").check()
    expect(widget.root.get_by_alt_text(re.compile("^Heat map of sample 1"))).to_be_visible()
    widget.list("Heat map").uncheck()
    expect(widget.root.get_by_alt_text(re.compile("^Heat map"))).to_have_count(0)
    widget.list("Heat map").check()
    expect(widget.root.get_by_alt_text(re.compile("^Heat map"))).to_be_visible()


def test_the_keyboard_alone_is_enough(widget, pictures):
    keyboard = widget.page.keyboard
    widget.page.evaluate("document.activeElement.blur()")
    with widget.page.expect_file_chooser() as chooser:
        widget.tab_to("Upload pictures")
        keyboard.press("Enter")
    chooser.value.set_files([pictures["truck.png"]])
    expect(widget.root.get_by_alt_text("truck.png, as given")).to_be_visible()
    widget.tab_to("Heat map")
    keyboard.press("Space")
    widget.tab_to("Predict")
    keyboard.press("Space")
    expect(widget.status).to_contain_text("truck.png: predicted truck")
    expect(widget.root.get_by_alt_text(re.compile("^Heat map of truck.png"))).to_be_visible()
    widget.page.evaluate("document.activeElement.blur()")
    widget.tab_to("5 ")
    keyboard.press("Enter")
    expect(widget.root).to_contain_text("sample 5: ")
    expect(widget.root.get_by_role("button", name=re.compile("^✓ 5 "))).to_be_focused()
    expect(widget.answers_of("")).to_have_count(0)


def kernel_of(widget: Widget) -> str:
    return json.loads(widget.page.locator("#jupyter-config-data").text_content())["kernelId"]


def test_visitors_do_not_see_each_others_pictures(widget, app, open_page, photograph, pictures):
    page = open_page(app.url)
    photograph.append(page)
    second = Widget(page, page.locator("body"))
    assert kernel_of(widget) != kernel_of(second)
    widget.upload(pictures["truck.png"])
    expect(widget.root).to_contain_text("truck.png")
    second.thumbnail(3).click()
    second.list("Language").select_option("français")
    second.button("Prédire").click()
    widget.button("Predict").click()
    expect(widget.status).to_contain_text("truck.png: predicted truck")
    expect(second.status).to_contain_text("exemple 3")
    expect(second.root).not_to_contain_text("truck.png")
    expect(widget.button("Predict")).to_be_visible()


def test_no_code_is_in_the_page_and_none_can_be_run(widget):
    expect(widget.root).not_to_contain_text("Predicting with")
    content = widget.page.content()
    assert "cifar_ft.widget" not in content
    assert "page()" not in content
    assert "Traceback" not in content
    # A kernel's socket takes messages of widgets, but no code. Its shell answers in order: the reply to the second
    # message proves that the first was passed over.
    replies = widget.page.evaluate(
        """async (kernel) => {
        const socket = new WebSocket(`ws://${location.host}/api/kernels/${kernel}/channels?session_id=mine`);
        const types = [];
        const answered = new Promise(resolve => {
          socket.onmessage = message => {
            if (typeof message.data === 'string') types.push(JSON.parse(message.data).msg_type);
            if (types.includes('kernel_info_reply')) setTimeout(resolve, 500);
          };
        });
        await new Promise(resolve => { socket.onopen = resolve });
        const send = (type, content) => socket.send(JSON.stringify({
          header: {msg_id: type, msg_type: type, session: 'mine', username: '', version: '5.3', date: ''},
          parent_header: {}, metadata: {}, content, channel: 'shell', buffers: []}));
        send('execute_request', {code: '6 * 7', silent: false, store_history: false, user_expressions: {},
          allow_stdin: false});
        send('kernel_info_request', {});
        await answered;
        socket.close();
        return types;
        }""",
        kernel_of(widget),
    )
    assert "kernel_info_reply" in replies
    assert not {"execute_reply", "execute_result", "execute_input"} & set(replies)


@pytest.mark.parametrize(
    "path",
    [
        "terminals/1",
        "api/terminals",
        "api/contents",
        "api/contents/app.ipynb",
        "api/kernels",
        "api/sessions",
        "tree",
        "lab",
        "lab/tree/app.ipynb",
        "notebooks/app.ipynb",
        "files/app.ipynb",
        "nbextensions/",
        "static/",
        "static/style/style.min.css",
        "voila/files/app.ipynb",
        "voila/files/",
        "voila/files/../../ready",
        "voila/render/app.ipynb",
        "voila/tree/",
        "voila/static/",
        "voila/static/../../../../etc/passwd",
        "voila/labextensions/",
        "other.ipynb",
        "app.ipynb",
    ],
)
def test_nothing_but_the_page_is_served(app, path):
    with pytest.raises(urllib.error.HTTPError) as refusal:
        urllib.request.urlopen(app.url + path, timeout=10)
    assert refusal.value.code in (400, 403, 404, 405)
    refusal.value.close()


def test_a_foreign_name_for_this_machine_is_refused(app):
    request = urllib.request.Request(app.url, headers={"Host": "attacker.example"})
    with pytest.raises(urllib.error.HTTPError) as refusal:
        urllib.request.urlopen(request, timeout=10)
    assert refusal.value.code == 403
    refusal.value.close()


def test_at_last_it_ends_with_all_that_it_started(app):
    psutil = pytest.importorskip("psutil")
    from cifar_ft.widget.app import check_port

    children = psutil.Process(app.process.pid).children(recursive=True)
    assert len(children) >= 3  # Voila and two visitors' kernels
    app.process.send_signal(signal.SIGINT)
    assert app.process.wait(timeout=120) == 0
    psutil.wait_procs(children, timeout=10)
    assert [child for child in children if child.is_running()] == []
    assert list(app.folder.iterdir()) == []
    check_port("127.0.0.1", app.port)
    assert "Stopped.\n" in app.process.lines
