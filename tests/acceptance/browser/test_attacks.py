"""A page of another origin, open in a browser on the same machine: it must not reach a Prefect server that we start.

Each attack gets through to a server as `prefect server start` makes it: whoever serves its deployments would run code.
"""

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
import requests
from playwright.sync_api import Browser, BrowserContext, Error, Page

from tests.acceptance.conftest import environment
from tests.conftest import PrefectServer, wait_until

from .conftest import PATIENCE_SECONDS
from .prefect_pages import PrefectPages

#: seconds; an event is written a moment after it was taken.
SETTLE_SECONDS = 3
FLOW = "attacked"


class Target:
    """A server with one deployment, and what an attacker could change of it."""

    def __init__(self, server: PrefectServer, *, is_open: bool) -> None:
        self.server, self.is_open = server, is_open
        flow_id = server.ask("/flows/", name=FLOW)["id"]
        deployment = server.ask("/deployments/", name="here", flow_id=flow_id, entrypoint="ours.py:flow", path="/ours")
        self.deployment_id = deployment["id"]

    def state(self) -> dict[str, Any]:
        deployment = self.server.request("GET", f"/deployments/{self.deployment_id}").json()
        events = self.server.ask("/events/filter", filter={"event": {"name": ["attack"]}})["events"]
        return {
            "entrypoint": deployment["entrypoint"],
            "steps": deployment["pull_steps"],
            "runs": self.server.ask("/flow_runs/count"),
            "events": len(events),
        }


@pytest.fixture(scope="module", params=["open", "shut"])
def target(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Target]:
    is_open = request.param == "open"
    server = PrefectServer(tmp_path_factory.mktemp(request.param), environment(), is_open=is_open)
    try:
        server.start()
        yield Target(server, is_open=is_open)
    finally:
        server.stop()


@pytest.fixture(scope="module")
def victim(browser: Browser, target: Target) -> Iterator[BrowserContext]:
    """Somebody's browser; where the server asks for a password it has been given."""
    with browser.new_context() as context:
        context.set_default_timeout(PATIENCE_SECONDS * 1000)
        page = context.new_page()
        if not target.is_open:
            PrefectPages(page, target.server.pages).log_in(target.server.password)
        PrefectPages(page, target.server.pages).open("deployments")
        page.get_by_text("1 Deployment").wait_for()
        yield context


@pytest.fixture(scope="module")
def elsewhere() -> Iterator[str]:
    """Another origin on this machine."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "text/html")
            self.end_headers()
            self.wfile.write(b"<!doctype html><title>harmless</title>")

        def log_message(self, *arguments: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()
        thread.join()


@pytest.fixture
def page(victim: BrowserContext, elsewhere: str) -> Iterator[Page]:
    page = victim.new_page()
    page.goto(elsewhere)
    yield page
    page.close()


CODE = "JSON.stringify({entrypoint: 'theirs.py:flow' + Math.random()})"
STEPS = "JSON.stringify({pull_steps: [{'prefect.deployments.steps.run_shell_script': {script: 'id' + Math.random()}}]})"
JSON_TYPE = "headers: {'Content-Type': 'application/json'}"
#: In each, `api` is the address and `deployment` what is attacked. What they change is looked at afterwards.
WRITES = {
    "entrypoint": f"fetch(deployment, {{method: 'PATCH', {JSON_TYPE}, body: {CODE}}})",
    "entrypoint, without a content type": f"fetch(deployment, {{method: 'PATCH', body: new Blob([{CODE}])}})",
    "entrypoint, with what the browser keeps": (
        f"fetch(deployment, {{method: 'PATCH', credentials: 'same-origin', {JSON_TYPE}, body: {CODE}}})"
    ),
    "pull steps": f"fetch(deployment, {{method: 'PATCH', {JSON_TYPE}, body: {STEPS}}})",
    "run": f"fetch(deployment + '/create_flow_run', {{method: 'POST', {JSON_TYPE}, body: '{{}}'}})",
    "run, without a content type": ("fetch(deployment + '/create_flow_run', {method: 'POST', body: new Blob(['{}'])})"),
    "run, unseen": (
        "fetch(deployment + '/create_flow_run', {method: 'POST', mode: 'no-cors', body: new Blob(['{}'])})"
    ),
    "run, unseen, with what the browser keeps": (
        "fetch(deployment + '/create_flow_run',"
        " {method: 'POST', mode: 'no-cors', credentials: 'include', body: new Blob(['{}'])})"
    ),
    "run, as the page is left": "navigator.sendBeacon(deployment + '/create_flow_run', new Blob(['{}']))",
    "run, with a token that is asked for first": (
        "fetch(api + '/csrf-token?client=8a4ac0a3-4b0c-4b6c-9fd0-5a0a3d0a7b11').then(answer => answer.json())"
        ".catch(() => ({token: 'x'}))"
        ".then(({token}) => fetch(deployment + '/create_flow_run', {method: 'POST', body: '{}', headers: {"
        "'Content-Type': 'application/json', 'Prefect-Csrf-Token': token || 'x',"
        "'Prefect-Csrf-Client': '8a4ac0a3-4b0c-4b6c-9fd0-5a0a3d0a7b11'}}))"
    ),
    "event": (
        "new Promise(resolve => { const socket = new WebSocket(api.replace('http', 'ws') + '/events/in');"
        " socket.onclose = socket.onerror = resolve;"
        " socket.onopen = () => { socket.send(JSON.stringify({event: 'attack', id: crypto.randomUUID(),"
        " occurred: new Date().toISOString(), resource: {'prefect.resource.id': 'x'}, payload: {}, related: []}));"
        " setTimeout(() => socket.close(), 500); } })"
    ),
}


def attack(page: Page, target: Target, script: str) -> Any:
    """What it returns; None if the browser refuses."""
    api = target.server.url
    names = f"const api = '{api}', deployment = '{api}/deployments/{target.deployment_id}';"
    try:
        return page.evaluate(f"async () => {{ {names} return await {script} }}")
    except Error:
        return None


@pytest.mark.parametrize("script", WRITES.values(), ids=WRITES)
def test_it_writes_to_an_open_server_and_not_to_ours(page: Page, target: Target, script: str) -> None:
    before = target.state()

    attack(page, target, script)
    page.wait_for_timeout(SETTLE_SECONDS * 1000)

    if target.is_open:
        wait_until(lambda: target.state() != before)
    else:
        assert target.state() == before


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data"])
def test_a_form_writes_to_neither(page: Page, target: Target, kind: str) -> None:
    """What a form sends is no JSON to the server, whatever is in it."""
    before = target.state()
    action = f"{target.server.url}/deployments/{target.deployment_id}/create_flow_run"
    page.evaluate(
        """([action, kind]) => {
            const form = document.createElement('form'), field = document.createElement('input');
            Object.assign(form, {action, method: 'post', enctype: kind});
            Object.assign(field, {name: '{"name": "', value: '"}'});
            form.append(field); document.body.append(form); form.submit();
        }""",
        [action, kind],
    )
    page.wait_for_url(action)
    page.wait_for_timeout(SETTLE_SECONDS * 1000)

    assert target.state() == before


READS = {
    "deployments": (
        f"fetch(api + '/deployments/filter', {{method: 'POST', {JSON_TYPE}, body: '{{}}'}}).then(read => read.text())"
    ),
    "deployment": "fetch(deployment).then(read => read.text())",
    "runs": "fetch(api + '/flow_runs/count', {method: 'POST', body: new Blob(['{}'])}).then(read => read.text())",
    "settings": "fetch(api + '/admin/settings').then(read => read.text())",
}


@pytest.mark.parametrize("script", READS.values(), ids=READS)
def test_it_reads_from_an_open_server_and_not_from_ours(page: Page, target: Target, script: str) -> None:
    read = attack(page, target, script)

    assert (read is not None) == target.is_open
    assert read is None or "Unauthorized" not in read


def test_it_does_not_find_the_password_that_the_browser_keeps(page: Page, target: Target) -> None:
    """The pages of the server keep it, in a place that belongs to their origin."""
    opened = f"window.open('{target.server.pages}/v2/deployments')"
    looks = [
        "localStorage.getItem('prefect-password')",
        "document.cookie",
        f"new Promise(resolve => {{ const other = {opened};"
        " setTimeout(() => resolve(other.localStorage.getItem('prefect-password')), 3000) })",
    ]
    found = [attack(page, target, look) for look in looks]
    own = page.context.pages[0].evaluate("localStorage.getItem('prefect-password')")

    assert not found[0]
    assert not found[2]
    assert "prefect-password" not in (found[1] or "")
    assert bool(own) != target.is_open


REQUESTS = {
    "read": ("GET", "", None),
    "entrypoint": ("PATCH", "", {"entrypoint": "theirs.py:flow"}),
    "pull steps": ("PATCH", "", {"pull_steps": []}),
    "run": ("POST", "/create_flow_run", {}),
}


@pytest.mark.parametrize("origin", [{}, {"Origin": "http://127.0.0.1:1"}], ids=["no page", "a page"])
@pytest.mark.parametrize("password", [None, ("make-serve", "guessed"), ("tests", "")])
@pytest.mark.parametrize(("method", "path", "body"), REQUESTS.values(), ids=REQUESTS)
def test_without_the_password_the_api_is_closed(
    target: Target, method: str, path: str, body: object, password: tuple[str, str] | None, origin: dict[str, str]
) -> None:
    url = f"{target.server.url}/deployments/{target.deployment_id}{path}"

    answer = requests.request(method, url, json=body, auth=password, headers=origin, timeout=30)

    assert answer.ok == target.is_open
    assert target.is_open or answer.status_code in (401, 403)
