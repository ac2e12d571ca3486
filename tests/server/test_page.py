"""The page's files and /v1/engine/state over HTTP: what is public, the policy that locks the page in, one snapshot for many watchers."""

from __future__ import annotations

import json
import re
import threading
from pathlib import Path
from typing import Any

import httpx
import pytest
from http_helpers import load, post, slow_down, wait_until_free

import minfer.server.page as page
from minfer import AsyncLLM
from minfer.server import ServerOptions
from minfer.server.page import PAGE_PATHS
from minfer.server.page import live as page_live
from minfer.server.slot import ModelSlot

STATIC = Path(page.__file__).parent / "static"
STATE = "/v1/engine/state"


def test_every_file_is_served_locked_in_and_cached_by_its_content(client: httpx.Client) -> None:
    assert {"/", "/static/app.js", "/static/style.css", "/static/learn.md"} <= PAGE_PATHS
    for path in PAGE_PATHS:
        answer = client.get(path)
        assert answer.status_code == 200
        name = "index.html" if path == "/" else path.removeprefix("/static/")
        assert answer.content == (STATIC / name).read_bytes()
        policy = answer.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        assert "http" not in policy, "no other host"
        assert "require-trusted-types-for 'script'" in policy
        assert answer.headers["x-content-type-options"] == "nosniff"
        again = client.get(path, headers={"if-none-match": answer.headers["etag"]})
        assert (again.status_code, again.content) == (304, b"")
        assert client.head(path).status_code == 200
    assert client.get("/static/../app.py").status_code == 404
    assert client.get("/static/nothing.js").status_code == 404
    assert not any(path in client.get("/openapi.json").json()["paths"] for path in PAGE_PATHS)


def test_the_page_names_no_other_host_and_no_way_for_text_to_become_markup() -> None:
    for file in STATIC.iterdir():
        text = file.read_text()
        hosts = set(re.findall(r"https?://([\w.-]+)", text)) - {"www.w3.org", "elsewhere"}  # SVG's namespace; an example in a comment
        assert not hosts, f"{file.name} names {hosts}"
        if file.suffix in (".js", ".html"):
            code = re.sub(r"//.*", "", text)
            banned = r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function|DOMParser|srcdoc| on\w+=\""
            assert not re.search(banned, code), file.name
    html = (STATIC / "index.html").read_text()
    assert not re.search(r"<script(?![^>]*\bsrc=)|<style| style=", html), "the policy allows no inline script or style"
    assert all(f"/static/{name}" in PAGE_PATHS for name in re.findall(r'(?:src|href)="/static/([^"]+)"', html))


def test_every_section_that_a_panel_refers_to_exists() -> None:
    headings = re.findall(r"^#+ (.*)$", (STATIC / "learn.md").read_text(), re.MULTILINE)
    sections = {heading.lower().replace(" ", "-") for heading in headings}
    wanted = set(re.findall(r'panel\("[^"]+", "([\w-]+)"', (STATIC / "engine.js").read_text()))
    assert len(wanted) >= 5
    assert wanted <= sections


def test_a_key_covers_the_state_and_not_the_page(llm: AsyncLLM, serve: Any) -> None:
    with serve(llm, api_key="sesame") as locked:
        assert all(locked.get(path).status_code == 200 for path in PAGE_PATHS)
        assert locked.get(STATE).status_code == 401
        assert locked.get(STATE, headers={"authorization": "Bearer sesame"}).status_code == 200


def test_the_page_is_there_while_the_model_loads(tiny_llama: Path, serve: Any) -> None:
    with serve(ModelSlot("m", ServerOptions())) as loading:
        assert loading.get("/").status_code == 200
        assert loading.get(STATE).json()["error"]["code"] == "model_loading"


def test_only_new_steps_are_sent(client: httpx.Client, llm: AsyncLLM) -> None:
    client.get(STATE)
    before = client.get(STATE).json()["counters"]["steps"]
    post(client, "/v1/completions", prompt="A block", max_tokens=5, ignore_eos=True)
    wait_until_free(llm)

    def fresh(since: int) -> dict[str, Any]:
        threading.Event().wait(page_live.FRESH_SECONDS * 1.5)
        return dict(client.get(STATE, params={"since": since}).json())

    seen = fresh(before)
    assert [step["step"] for step in seen["steps"]] == list(range(before + 1, before + 6))
    assert seen["counters"]["steps"] == llm.engine.core.scheduler.stats.num_steps == before + 5
    assert [step["step"] for step in fresh(before + 3)["steps"]] == [before + 4, before + 5]
    assert fresh(before + 5)["steps"] == []
    assert client.get(STATE, params={"since": -1}).status_code == 400
    assert client.get(STATE, params={"since": "x"}).status_code == 400


def test_many_watchers_cost_the_engine_one_snapshot(own_llm: AsyncLLM, serve: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page_live, "FRESH_SECONDS", 3600)
    made: list[str] = []
    inspect = own_llm.inspect

    async def counting(look: Any) -> Any:
        made.append(threading.current_thread().name)
        return await inspect(lambda engine: (made.append(threading.current_thread().name), look(engine))[1])

    monkeypatch.setattr(own_llm, "inspect", counting)
    with serve(own_llm) as client:
        url = str(client.base_url) + STATE
        threads = [threading.Thread(target=lambda: [httpx.get(url, timeout=30) for _ in range(5)]) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(made) == 2
    assert made[1] == "minfer-engine", "between two steps"


def test_looking_while_requests_run_changes_nothing_about_them(own_llm: AsyncLLM, serve: Any) -> None:
    slow_down(own_llm, 0.005)
    with serve(own_llm) as client:
        body = {"prompt": "A table names", "max_tokens": 40, "temperature": 0, "ignore_eos": True}
        alone = post(client, "/v1/completions", **body)["choices"]
        answers: list[Any] = []
        asking = threading.Thread(target=lambda: answers.append(post(client, "/v1/completions", **body)["choices"]))
        asking.start()
        seen = []
        while asking.is_alive():
            seen.append(client.get(STATE).json())
        asking.join()
        assert answers == [alone]
        running = [state for state in seen if state["num_running"]]
        assert running
        assert "table names" not in json.dumps(seen)


def test_an_engine_that_is_gone_is_a_clear_503(tiny_llama: Path, serve: Any) -> None:
    llm = load(tiny_llama)
    with serve(llm) as client:
        assert client.get(STATE).status_code == 200
        llm.shutdown()
        answer = client.get(STATE)
        assert answer.status_code == 503
        assert "not running" in answer.json()["error"]["message"]
