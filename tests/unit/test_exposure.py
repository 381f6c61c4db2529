"""Where the API may be asked to run an image and a command."""

import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import httpx
import pytest
from prefect.settings import (
    PREFECT_API_AUTH_STRING,
    PREFECT_API_KEY,
    PREFECT_API_SSL_CERT_FILE,
    PREFECT_API_URL,
    PREFECT_CLIENT_CSRF_SUPPORT_ENABLED,
    PREFECT_CLIENT_CUSTOM_HEADERS,
    temporary_settings,
)
from prefect.settings import (
    Settings as PrefectSettings,
)

from container_manager.conf import Settings
from flows.asking import ANSWER_SECONDS
from flows.exposure import why_open
from flows.strangers import port_of
from tests.conftest import free_port
from tests.unit.fake_api import BREAKS_OFF, HANGS, NOT_HTTP, Answer, Asked, FakeApi, fake_api

IMAGES = ("registry.example/team/*",)
#: In all that says who we are; in no question and in no sentence.
SECRET = "hunter2"


def elsewhere(api: FakeApi) -> str:
    """An address of this API that is no loopback's."""
    return f"http://0.0.0.0:{api.server_port}/api"


def somebody(url: str, **headers: str) -> AbstractContextManager[PrefectSettings]:
    """With all that says who we are: an auth string, a key, a password in the URL, custom headers."""
    return temporary_settings(
        {
            PREFECT_API_URL: url.replace("://", f"://somebody:{SECRET}@"),
            PREFECT_API_AUTH_STRING: f"somebody:{SECRET}",
            PREFECT_API_KEY: SECRET,
            PREFECT_CLIENT_CUSTOM_HEADERS: {"Authorization": SECRET, "cookie": SECRET, **headers},
        }
    )


def kind(why: str) -> str:
    """Closed, open or unknown. A sentence says one of two things, and no secret."""
    assert SECRET not in why
    if "could not be asked" in why:
        assert "anybody" not in why
        return "unknown"
    assert not why or "takes flow runs from anybody" in why
    return "open" if why else "closed"


def redirect(target: str, status: int = 302) -> Answer:
    return Answer(status, "", {"Location": target})


ANSWERS: dict[str, tuple[Answer, str]] = {
    "unauthorized": (Answer(401, ""), "closed"),
    "forbidden": (Answer(403, "<html>no</html>"), "closed"),
    "login page": (redirect("/login?next=/api/flow_runs/count"), "closed"),
    "login elsewhere, 301": (redirect("https://login.example/", 301), "closed"),
    "login elsewhere, 303": (redirect("https://login.example/authorize", 303), "closed"),
    "login elsewhere, 307": (redirect("//login.example/authorize", 307), "closed"),
    "login elsewhere, 308": (redirect("https://login.example/authorize", 308), "closed"),
    "a count": (Answer(), "open"),
    "another count": (Answer(201, " 17\n"), "open"),
    "moved to https": (redirect("https://prefect.example/api/flow_runs/count", 301), "unknown"),
    "moved behind a slash": (redirect("/api/flow_runs/count/", 308), "unknown"),
    "moved below a path": (redirect("https://prefect.example/prefect/api/flow_runs/count", 307), "unknown"),
    "moved nowhere": (Answer(302, ""), "unknown"),
    "moved to no address": (redirect("https://[::1"), "unknown"),
    "nothing": (Answer(200, ""), "unknown"),
    "no content": (Answer(204, ""), "unknown"),
    "a page": (Answer(200, "<html>Prefect</html>"), "unknown"),
    "a bool": (Answer(200, "true"), "unknown"),
    "an object": (Answer(200, '{"count": 0}'), "unknown"),
    "below zero": (Answer(200, "-1"), "unknown"),
    "no such page": (Answer(404, "0"), "unknown"),
    "no such method": (Answer(405, ""), "unknown"),
    "not for this proxy": (Answer(407, ""), "unknown"),
    "too many": (Answer(429, "", {"Retry-After": "3600"}), "unknown"),
    "broken": (Answer(500, "0"), "unknown"),
    "no server behind": (Answer(502, ""), "unknown"),
    "busy": (Answer(503, "", {"Retry-After": "3600"}), "unknown"),
    "under maintenance": (Answer(503, "", {"Prefect-Maintenance": "true"}), "unknown"),
    "silent": (HANGS, "unknown"),
    "breaks off": (BREAKS_OFF, "unknown"),
    "not HTTP": (NOT_HTTP, "unknown"),
}


@pytest.mark.parametrize(("answer", "expected"), ANSWERS.values(), ids=ANSWERS)
def test_an_api_is_closed_or_open_or_it_is_not_known_which(answer: Answer, expected: str) -> None:
    with fake_api(answer) as api, somebody(elsewhere(api)):
        began = time.monotonic()
        why = why_open(Settings())

    assert kind(why) == expected
    assert not why or f"the Prefect API at {elsewhere(api)} " in why
    assert time.monotonic() - began < ANSWER_SECONDS + 5
    assert [(asked.method, asked.path) for asked in api.asked] == [("POST", "/api/flow_runs/count")]
    assert SECRET not in str(api.asked)


@pytest.mark.parametrize("status", [401, 403])
def test_an_api_that_asks_who_it_is_is_closed_to_who_has_no_answer_too(status: int) -> None:
    with fake_api(Answer(status)) as api, temporary_settings({PREFECT_API_URL: elsewhere(api)}):
        assert why_open(Settings()) == ""


UNREACHABLE: dict[str, tuple[str, str]] = {
    "no such name": ("http://prefect.invalid:4200/api", "can't be reached"),
    "nothing listens": ("http://0.0.0.0:{free}/api", "can't be reached"),
    "not TLS": ("https://0.0.0.0:{port}/api", "TLS"),
    "no scheme": ("prefect:4200/api", "PREFECT_API_URL is not an address"),
    "no host": ("http:///api", "PREFECT_API_URL is not an address"),
    "another scheme": ("ftp://prefect/api", "PREFECT_API_URL is not an address"),
    "no port": ("http://prefect:{free}0/api", "PREFECT_API_URL is not an address"),
    "a password with a slash": ("http://somebody:1/" + SECRET + "@prefect/api", "can't be reached"),
    "a password for a port": ("http://somebody:" + SECRET + "/x@prefect/api", "PREFECT_API_URL is not an address"),
}


@pytest.mark.parametrize(("url", "complaint"), UNREACHABLE.values(), ids=UNREACHABLE)
def test_an_api_that_can_not_be_asked_is_not_open_but_it_may_not_either(url: str, complaint: str) -> None:
    with fake_api(Answer()) as api:
        url = url.replace("{port}", str(api.server_port)).replace("{free}", str(free_port()))
        with temporary_settings({PREFECT_API_URL: url}):
            why = why_open(Settings())

    assert (kind(why), complaint in why) == ("unknown", True)
    assert why.startswith("the Prefect API could not" if "not an address" in complaint else "the Prefect API at http")


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        (PREFECT_API_SSL_CERT_FILE, "no such file"),
        (PREFECT_API_SSL_CERT_FILE, __file__),
        (PREFECT_CLIENT_CUSTOM_HEADERS, {"X-Token": f"{SECRET}\nforged: 1"}),
        (PREFECT_CLIENT_CUSTOM_HEADERS, {f"X {SECRET}": "1"}),
    ],
    ids=["no CA", "not a CA", "header of two lines", "header with a blank"],
)
def test_settings_that_can_not_be_used_are_named_without_their_values(setting: Any, value: Any) -> None:
    # Without an answer of use, so that the custom headers are sent, too.
    with fake_api(Answer(404)) as api, temporary_settings({PREFECT_API_URL: elsewhere(api), setting: value}):
        why = why_open(Settings())

    assert (kind(why), setting.name in why) == ("unknown", True)


@pytest.fixture
def no_proxies(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """To set one."""
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    return monkeypatch


def test_what_a_proxy_does_not_let_through_could_not_be_asked(no_proxies: pytest.MonkeyPatch) -> None:
    no_proxies.setenv("ALL_PROXY", f"http://127.0.0.1:{free_port()}")
    with temporary_settings({PREFECT_API_URL: "http://prefect.example/api"}):
        unreachable = why_open(Settings())
    with fake_api(Answer(407)) as proxy, temporary_settings({PREFECT_API_URL: "https://prefect.example/api"}):
        no_proxies.setenv("ALL_PROXY", f"http://somebody:{SECRET}@127.0.0.1:{proxy.server_port}")
        refused = why_open(Settings())
    no_proxies.setenv("ALL_PROXY", f"gopher://{SECRET}")
    with temporary_settings({PREFECT_API_URL: "https://prefect.example/api"}):
        unfit = why_open(Settings())

    assert [kind(why) for why in (unreachable, refused, unfit)] == ["unknown"] * 3
    assert unreachable.startswith(
        "the Prefect API at http://prefect.example/api, reached through a proxy, could not be"
    )
    assert "NO_PROXY" in refused
    assert "ALL_PROXY" in unfit


@pytest.mark.parametrize(
    ("answer", "expected"), [(Answer(), "open"), (Answer(401), "closed"), (Answer(502), "unknown")], ids=str
)
def test_loopback_is_the_proxys_where_there_is_one(
    no_proxies: pytest.MonkeyPatch, answer: Answer, expected: str
) -> None:
    with fake_api(answer) as proxy, temporary_settings({PREFECT_API_URL: "http://127.0.0.1:4200/api"}):
        no_proxies.setenv("HTTP_PROXY", f"http://127.0.0.1:{proxy.server_port}")
        no_proxies.setenv("NO_PROXY", "prefect.example")
        proxied = why_open(Settings())
        no_proxies.setenv("NO_PROXY", "prefect.example,127.0.0.1")
        direct = why_open(Settings())

    assert (kind(proxied), direct) == (expected, "")
    assert proxy.asked[0].path == "http://127.0.0.1:4200/api/flow_runs/count"


def gateway(otherwise: Answer, behind: Answer) -> Callable[[Asked], Answer]:
    """It lets through who sends the header."""
    return lambda asked: behind if asked.headers.get("x-tenant") == "team" else otherwise


GATEWAYS: dict[str, tuple[Callable[[Asked], Answer], str]] = {
    "its header is the password": (gateway(Answer(401), Answer()), "closed"),
    "without it, a login": (gateway(redirect("/login"), Answer()), "closed"),
    "it needs none": (gateway(Answer(), Answer()), "open"),
    "it needs none, and then says no": (gateway(Answer(), Answer(403)), "open"),
    "it finds the tenant by it": (gateway(Answer(404), Answer(401)), "closed"),
    "it finds the tenant's login by it": (gateway(Answer(400), redirect("/login")), "closed"),
    "it drops who has none": (gateway(BREAKS_OFF, Answer(403)), "closed"),
    "it finds an open tenant by it": (gateway(Answer(404), Answer()), "unknown"),
    "it finds a broken tenant by it": (gateway(Answer(404), Answer(500)), "unknown"),
}


@pytest.mark.parametrize(("answer", "expected"), GATEWAYS.values(), ids=GATEWAYS)
def test_custom_headers_are_sent_where_nothing_is_answered_without_them(
    answer: Callable[[Asked], Answer], expected: str
) -> None:
    with fake_api(answer) as api, somebody(elsewhere(api), **{"X-Tenant": "team"}):
        why = why_open(Settings())

    assert kind(why) == expected
    assert len(api.asked) <= 2
    assert SECRET not in str(api.asked)


def csrf_protected(token: Answer, with_token: Answer) -> Callable[[Asked], Answer]:
    def answer(asked: Asked) -> Answer:
        if asked.path.startswith("/api/csrf-token"):
            return token
        return with_token if "prefect-csrf-token" in asked.headers else Answer(403, '{"detail": "Missing CSRF token."}')

    return answer


TOKEN = Answer(200, '{"token": "abc", "client": "us", "expiration": "2099-01-01T00:00:00Z"}')
CSRF: dict[str, tuple[Answer, Answer, str]] = {
    "anybody gets a token": (TOKEN, Answer(), "open"),
    "a token is not enough": (TOKEN, Answer(401), "closed"),
    "no token for strangers": (Answer(401), Answer(), "closed"),
    "a login before the tokens": (redirect("/login"), Answer(), "closed"),
    "a token that is refused": (TOKEN, Answer(403, "Invalid CSRF token or client identifier."), "unknown"),
    "no tokens": (Answer(404), Answer(), "unknown"),
    "a page for a token": (Answer(200, "<html>"), Answer(), "unknown"),
    "broken tokens": (Answer(500), Answer(), "unknown"),
}


@pytest.mark.parametrize("is_enabled", [True, False])
@pytest.mark.parametrize(("token", "with_token", "expected"), CSRF.values(), ids=CSRF)
def test_protection_against_csrf_asks_nobody_who_it_is(
    token: Answer, with_token: Answer, expected: str, is_enabled: bool
) -> None:
    with (
        fake_api(csrf_protected(token, with_token)) as api,
        somebody(elsewhere(api)),
        temporary_settings({PREFECT_CLIENT_CSRF_SUPPORT_ENABLED: is_enabled}),
    ):
        assert kind(why_open(Settings())) == expected
    assert SECRET not in str(api.asked)


@pytest.mark.parametrize(
    "url",
    [
        "http://127.0.0.1:{free}/api",
        "http://127.1.2.3:{free}/api",
        "http://localhost:{free}/api",
        "http://[::1]:{free}/api",
        "http://[::ffff:127.0.0.1]:{free}/api",
    ],
)
def test_on_loopback_it_may(url: str) -> None:
    with temporary_settings({PREFECT_API_URL: url.replace("{free}", str(free_port()))}):
        assert why_open(Settings()) == ""


def reached(host: str, api: FakeApi) -> AbstractContextManager[PrefectSettings]:
    return temporary_settings({PREFECT_API_URL: f"http://{host}:{api.server_port}/api"})


LOOPBACK = [
    ("127.0.0.1", "127.0.0.1"),
    ("127.0.0.1", "localhost"),
    ("127.1.2.3", "127.1.2.3"),
    ("::1", "[::1]"),
    ("127.0.0.1", "[::ffff:127.0.0.1]"),
    ("::ffff:127.0.0.1", "127.0.0.1"),
]
BEYOND = [
    ("0.0.0.0", "127.0.0.1"),
    ("0.0.0.0", "127.1.2.3"),
    ("0.0.0.0", "localhost"),
    ("::", "127.0.0.1"),
    ("::", "[::1]"),
    ("::", "localhost"),
    ("::", "[::ffff:127.0.0.1]"),
]


@pytest.mark.parametrize(("bound_to", "host"), LOOPBACK)
def test_what_listens_on_loopback_alone_need_not_ask_who_it_is(bound_to: str, host: str) -> None:
    with fake_api(Answer(), bound_to) as api, reached(host, api):
        assert why_open(Settings()) == ""


@pytest.mark.parametrize(("bound_to", "host"), BEYOND)
def test_what_others_can_reach_is_not_loopback_because_we_reach_it_so(bound_to: str, host: str) -> None:
    with fake_api(Answer(), bound_to) as api, reached(host, api):
        why = why_open(Settings())
    with fake_api(Answer(401), bound_to) as api, reached(host, api):
        closed = why_open(Settings())
    with fake_api(Answer(500), bound_to) as api, reached(host, api):
        unknown = why_open(Settings())

    assert f"takes flow runs from anybody, since it listens on {bound_to} too" in why
    assert "--host 127.0.0.1" in why
    assert "PREFECT_SERVER_API_AUTH_STRING" in why
    assert (closed, kind(unknown)) == ("", "unknown")


@pytest.mark.parametrize(
    ("told", "expected"),
    [
        (Answer(200, '{"server": {"api": {"host": "0.0.0.0"}}}'), "open"),
        (Answer(200, '{"server": {"api": {"host": "prefect"}}}'), "open"),
        (Answer(200, '{"server": {"api": {"host": "127.0.0.1"}}}'), "closed"),
        (Answer(200, '{"server": {"api": {"host": "localhost"}}}'), "closed"),
        (Answer(200, '{"server": {"api": {"host": null}}}'), "closed"),
        (Answer(200, "<html>"), "closed"),
        (Answer(401, ""), "closed"),
        (HANGS, "closed"),
    ],
    ids=str,
)
def test_a_server_behind_a_tunnel_is_believed_that_it_listens_elsewhere(told: Answer, expected: str) -> None:
    def answer(asked: Asked) -> Answer:
        return told if asked.path == "/api/admin/settings" else Answer()

    with fake_api(answer) as tunnel, reached("127.0.0.1", tunnel):
        assert kind(why_open(Settings())) == expected


def test_images_that_are_named_make_an_open_api_harmless_unless_secrets_are_resolved() -> None:
    with fake_api(Answer()) as api, temporary_settings({PREFECT_API_URL: elsewhere(api)}):
        whys = [
            why_open(Settings(ALLOWED_IMAGES=images, SECRET_RESOLVER=resolver))
            for images in ((), IMAGES)
            for resolver in (None, "os.getenv")
        ]

    assert [kind(why) for why in whys] == ["open", "open", "closed", "open"]
    assert ["or set ALLOWED_IMAGES" in why for why in whys] == [True, False, False, False]
    assert ["ALLOWED_IMAGES is not enough beside a SECRET_RESOLVER" in why for why in whys] == [
        False,
        True,
        False,
        True,
    ]


def test_where_images_are_named_an_api_that_is_away_is_not_asked() -> None:
    with temporary_settings({PREFECT_API_URL: f"http://0.0.0.0:{free_port()}/api"}):
        assert why_open(Settings(ALLOWED_IMAGES=IMAGES)) == ""
        assert kind(why_open(Settings(ALLOWED_IMAGES=IMAGES, SECRET_RESOLVER="os.getenv"))) == "unknown"


def test_without_an_api_it_may() -> None:
    with temporary_settings({PREFECT_API_URL: None}):
        assert why_open(Settings()) == ""


@pytest.mark.parametrize(
    ("url", "port"), [("http://127.0.0.1/api", 80), ("https://[::1]/api", 443), ("https://localhost:4200/api", 4200)]
)
def test_a_port_that_is_not_named_is_the_schemes(url: str, port: int) -> None:
    assert port_of(httpx.URL(url)) == port
