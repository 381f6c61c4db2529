"""A person's browser, and all that its pages need: Prefect's with the deployments served, and the site's."""

import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import docker
import pytest
import requests
from django.conf.global_settings import PASSWORD_HASHERS
from django.contrib.auth.models import User
from django.test import override_settings
from playwright.sync_api import Browser, BrowserContext, Page, expect, sync_playwright
from prefect.client.orchestration import SyncPrefectClient, get_client

from tests.acceptance.conftest import MANAGE, Site, connected, environment, installed, migrate, new_database
from tests.conftest import ROOT, TAG_SLOTS, PrefectServer, free_port, missing, wait_until

from .prefect_pages import PrefectPages

FLAGS = [
    "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
]  # fmt: skip
#: seconds; a flow run is a process that takes two to begin, more where others are at work.
PATIENCE_SECONDS = 60
PASSWORD = "only-for-this-test"

#: `keep("what")`: a picture of the page as it is now.
Keep = Callable[[str], None]


@contextmanager
def some_database(name: str, folder: Path) -> Iterator[str]:
    """PostgreSQL where there is one: Prefect on SQLite is slow to answer while runs are in progress."""
    if server := os.environ.get("TEST_POSTGRES_URL"):
        with new_database(server, name) as url:
            yield url
    else:
        yield f"sqlite:///{folder / f'{name}.sqlite3'}"


@pytest.fixture(scope="module")
def browser(request: pytest.FixtureRequest) -> Iterator[Browser]:
    path = os.environ.get("TEST_BROWSER")
    if not path:
        missing(request.config, "a Chromium (TEST_BROWSER)")
    expect.set_options(timeout=PATIENCE_SECONDS * 1000)
    with pytest.MonkeyPatch.context() as patch, sync_playwright() as playwright:
        # It keeps a loop in this thread, where Django would refuse to ask the database.
        patch.setenv("DJANGO_ALLOW_ASYNC_UNSAFE", "true")
        browser = playwright.chromium.launch(executable_path=path, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def person(browser: Browser, site: Site) -> Iterator[BrowserContext]:
    """What a browser keeps for a person: files, logins."""
    address = json.loads(site.env["CONTAINER_MANAGER"])["SITE_URL"]
    with browser.new_context(base_url=address, viewport={"width": 1400, "height": 1000}) as person:
        person.set_default_timeout(PATIENCE_SECONDS * 1000)
        yield person


@pytest.fixture
def page(person: BrowserContext) -> Iterator[Page]:
    page = person.new_page()
    yield page
    page.close()


@pytest.fixture
def keep(request: pytest.FixtureRequest, page: Page, tmp_path: Path) -> Iterator[Keep]:
    """Pictures go into the folder TEST_SCREENSHOTS; the last one of each test, too, however it ended."""
    folder = Path(os.environ.get("TEST_SCREENSHOTS") or tmp_path)

    def keep(name: str) -> None:
        page.screenshot(path=folder / f"{name}.png", full_page=True)

    yield keep
    keep(request.node.name)


def make_user(name: str, **fields: bool) -> User:
    """With a password that the site takes, which keeps them as Django does, not as the tests do."""
    with override_settings(PASSWORD_HASHERS=PASSWORD_HASHERS):
        return User.objects.create_user(name, password=PASSWORD, is_staff=True, **fields)


def log_in(page: Page, name: str = "admin") -> None:
    """On the site, which asks who it is."""
    page.get_by_label("Username").fill(name)
    page.get_by_label("Password").fill(PASSWORD)
    page.get_by_role("button", name="Log in").click()
    expect(page.get_by_role("button", name="Log out")).to_be_visible()


@pytest.fixture(scope="module")
def prefect(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PrefectServer]:
    """A server that is started by who needs it."""
    home = tmp_path_factory.mktemp("prefect")
    with some_database("prefect", home) as url:
        # By default it is SQLite in its home.
        database = {"PREFECT_SERVER_DATABASE_CONNECTION_URL": url.replace("postgres:", "postgresql+asyncpg:", 1)}
        # It takes a minute otherwise until a schedule that was resumed begins a run.
        soon = {"PREFECT_SERVER_SERVICES_SCHEDULER_LOOP_SECONDS": "5"}
        server = PrefectServer(home, environment(**TAG_SLOTS, **soon, **(database if "postgres" in url else {})))
        try:
            yield server
        finally:
            server.stop()


@pytest.fixture(scope="module")
def site(
    browser: Browser,
    tmp_path_factory: pytest.TempPathFactory,
    engine: docker.DockerClient,
    prefect: PrefectServer,
    django_db_blocker: Any,
) -> Iterator[Site]:
    """One for all tests of a file, with its pages served. The browser comes first: beside its loop Django has
    connections of their own."""
    folder = tmp_path_factory.mktemp("site")
    address = f"127.0.0.1:{free_port()}"
    settings = {
        "SITE_URL": f"http://{address}",
        "PREFECT_UI_URL": f"{prefect.pages}/v2",
        "POLL_INTERVAL_SECONDS": 5,
        "WORK_SECONDS": 4,
        "STOP_GRACE_SECONDS": 1,
    }
    env = environment(
        **prefect.client,
        PREFECT_HOME=str(folder),
        PYTHONPATH=str(ROOT),
        CONTAINER_MANAGER=json.dumps(settings),
    )
    with some_database("site", folder) as url:
        migrate(url, env)
        with connected(url, django_db_blocker), installed(url, env, folder, engine) as site:
            make_user("admin", is_superuser=True)
            site.start(program=[*MANAGE, "runserver", "--noreload", address])
            wait_until(lambda: answers(f"http://{address}/admin/login/"))
            yield site


def answers(url: str) -> bool:
    with suppress(requests.ConnectionError):
        return requests.get(url, timeout=10).ok
    return False


@pytest.fixture(scope="module")
def served(site: Site, prefect: PrefectServer) -> Iterator[Site]:
    """The site with its deployments, as `python -m deployments` serves them."""
    prefect.start()
    deployments = site.start(program=[sys.executable, "-m", "deployments"])
    deployments.wait_for("serving run-container-job", PATIENCE_SECONDS)
    yield site
    # What it runs is to end, too.
    deployments.send(signal.SIGTERM)
    deployments.end(PATIENCE_SECONDS)


@pytest.fixture(scope="module")
def logged_in(person: BrowserContext, served: Site, prefect: PrefectServer) -> None:
    """On Prefect's pages, which ask once; the browser keeps it."""
    page = person.new_page()
    PrefectPages(page, prefect.pages).log_in(prefect.password)
    page.close()


@pytest.fixture
def prefect_pages(page: Page, logged_in: None, prefect: PrefectServer) -> PrefectPages:
    return PrefectPages(page, prefect.pages)


@pytest.fixture
def api(served: Site, prefect: PrefectServer) -> Iterator[SyncPrefectClient]:
    with prefect.used(), get_client(sync_client=True) as client:
        yield client
