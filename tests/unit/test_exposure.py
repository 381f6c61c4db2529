"""Where the API may be asked to run an image and a command."""

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from prefect.settings import PREFECT_API_AUTH_STRING, PREFECT_API_URL, temporary_settings

from container_manager.conf import Settings
from flows import exposure


@pytest.mark.parametrize(
    "url",
    ["http://127.0.0.1:4200/api", "http://127.1.2.3/api", "http://localhost:4200/api", "http://[::1]:4200/api"],
)
def test_on_loopback_it_may(url: str) -> None:
    with temporary_settings({PREFECT_API_URL: url}):
        assert exposure.why_open(Settings()) == ""


@pytest.mark.parametrize(
    "url",
    ["http://prefect:4200/api", "http://10.0.0.1:4200/api", "http://localhost.example/api", "http://0.0.0.0:4200/api"],
)
def test_elsewhere_it_may_not_unless_images_are_named(url: str) -> None:
    with temporary_settings({PREFECT_API_URL: url}):
        assert exposure.why_open(Settings()).startswith(f"the Prefect API at {url} takes flow runs from anybody")
        assert exposure.why_open(Settings(ALLOWED_IMAGES=("registry.example/team/*",))) == ""


@pytest.fixture
def elsewhere(request: pytest.FixtureRequest) -> Iterator[str]:
    """An API that answers with this status whoever does not say who it is, at an address that is no loopback's."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.send_response(200 if self.headers.get("Authorization") else request.param)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *arguments: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://0.0.0.0:{server.server_port}/api"
        server.shutdown()
        thread.join()


@pytest.mark.parametrize(("elsewhere", "may"), [(401, True), (403, True), (200, False)], indirect=["elsewhere"])
def test_elsewhere_it_may_if_the_api_asks_who_it_is(elsewhere: str, may: bool) -> None:
    with temporary_settings({PREFECT_API_URL: elsewhere, PREFECT_API_AUTH_STRING: "somebody:secret"}):
        assert (exposure.why_open(Settings()) == "") is may


@pytest.mark.parametrize("elsewhere", [401], indirect=True)
def test_an_api_that_we_have_nothing_to_say_to_is_not_asked(elsewhere: str) -> None:
    with temporary_settings({PREFECT_API_URL: elsewhere}):
        assert exposure.why_open(Settings())
