"""The standalone site: everything from the environment, safe for a first look on this machine alone.

`DATABASE_URL` (`postgres://user:password@host:port/name`, `sqlite:///path`), `DJANGO_SECRET_KEY`,
`DJANGO_DEBUG` (1), `DJANGO_ALLOWED_HOSTS` and `DJANGO_CSRF_TRUSTED_ORIGINS` (commas between),
`CONTAINER_MANAGER` (the setting of that name as JSON), `CONTAINER_MANAGER_DENIED_NETWORKS` (commas between; added to
that setting's `DENIED_NETWORKS`).
"""

import json
import os
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit

from django.core.exceptions import ImproperlyConfigured
from django.core.management.utils import get_random_secret_key

from container_manager.private_files import DatabaseIsPrivate, NewDatabaseIsPrivate

BASE_DIR = Path(__file__).resolve().parent.parent


def database_from_url(url: str) -> dict[str, Any]:
    """Django's dict for one database; `ImproperlyConfigured` for a scheme that the queue is not tested on."""
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as e:
        raise ImproperlyConfigured(f"DATABASE_URL: {e}") from e
    if parts.scheme in ("postgres", "postgresql"):
        return {
            "ENGINE": "django.db.backends.postgresql",
            "NAME": unquote(parts.path.lstrip("/")),
            "USER": unquote(parts.username or ""),
            "PASSWORD": unquote(parts.password or ""),
            "HOST": unquote(parts.hostname or ""),
            "PORT": str(port or ""),
            # `?sslmode=require` and the like are libpq's.
            "OPTIONS": dict(parse_qsl(parts.query)),
            "CONN_HEALTH_CHECKS": True,
        }
    if parts.scheme == "sqlite":
        return {
            "ENGINE": "django.db.backends.sqlite3",
            "NAME": unquote(parts.path.removeprefix("/")),
            "OPTIONS": {
                # The write lock is taken at BEGIN: a lock that is asked for later fails at once when another
                # process writes, whatever the timeout.
                "transaction_mode": "IMMEDIATE",
                "timeout": 20,
                "init_command": "PRAGMA journal_mode=WAL; PRAGMA synchronous=NORMAL;",
                "factory": NewDatabaseIsPrivate,
            },
        }
    raise ImproperlyConfigured(f"DATABASE_URL: {parts.scheme or 'no scheme'}: use postgres:// or sqlite:///")


def _list(name: str) -> list[str]:
    return [item.strip() for item in os.environ.get(name, "").split(",") if item.strip()]


def _json(name: str) -> dict[str, Any]:
    text = os.environ.get(name, "{}")
    try:
        value = json.loads(text)
    except ValueError as e:
        raise ImproperlyConfigured(f"{name} in the environment must be a JSON object: {e}") from e
    if not isinstance(value, dict):
        raise ImproperlyConfigured(f"{name} in the environment must be a JSON object")
    return value


def _with_denied_networks(ours: dict[str, Any], names: list[str]) -> dict[str, Any]:
    """Adds the networks that the environment denies to those that the setting denies."""
    known = ours.get("DENIED_NETWORKS", [])
    # A value that is not a list is reported when the setting is checked.
    return ours | {"DENIED_NETWORKS": [*known, *names]} if names and isinstance(known, list) else ours


DEBUG = os.environ.get("DJANGO_DEBUG") == "1"
# Without a key of its own each process makes one: sessions then end with it, and nothing is signed by a
# key that everybody knows.
SECRET_KEY = os.environ.get("DJANGO_SECRET_KEY") or get_random_secret_key()
ALLOWED_HOSTS = _list("DJANGO_ALLOWED_HOSTS") or ["localhost", "127.0.0.1", "[::1]"]
CSRF_TRUSTED_ORIGINS = _list("DJANGO_CSRF_TRUSTED_ORIGINS")

DATABASES = {"default": database_from_url(os.environ.get("DATABASE_URL") or f"sqlite:///{BASE_DIR / 'db.sqlite3'}")}
if not os.environ.get("DATABASE_URL"):
    DATABASES["default"]["OPTIONS"]["factory"] = DatabaseIsPrivate
DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"

CONTAINER_MANAGER = _with_denied_networks(_json("CONTAINER_MANAGER"), _list("CONTAINER_MANAGER_DENIED_NETWORKS"))

INSTALLED_APPS = [
    "container_manager",
    # The pages are registered where they are served, in `urls`: no flow run and no command pays for their imports.
    "django.contrib.admin.apps.SimpleAdminConfig",
    "django.contrib.auth",
    "django.contrib.contenttypes",
    "django.contrib.sessions",
    "django.contrib.messages",
    "django.contrib.staticfiles",
]
MIDDLEWARE = [
    "django.middleware.security.SecurityMiddleware",
    "django.contrib.sessions.middleware.SessionMiddleware",
    "django.middleware.common.CommonMiddleware",
    "django.middleware.csrf.CsrfViewMiddleware",
    "django.contrib.auth.middleware.AuthenticationMiddleware",
    "django.contrib.messages.middleware.MessageMiddleware",
    "django.middleware.clickjacking.XFrameOptionsMiddleware",
]
ROOT_URLCONF = "container_manager.urls"
WSGI_APPLICATION = "container_manager.wsgi.application"
TEMPLATES = [
    {
        "BACKEND": "django.template.backends.django.DjangoTemplates",
        "APP_DIRS": True,
        "OPTIONS": {
            "context_processors": [
                "django.template.context_processors.request",
                "django.contrib.auth.context_processors.auth",
                "django.contrib.messages.context_processors.messages",
            ]
        },
    }
]
AUTH_PASSWORD_VALIDATORS = [
    {"NAME": "django.contrib.auth.password_validation.MinimumLengthValidator"},
    {"NAME": "django.contrib.auth.password_validation.CommonPasswordValidator"},
]
STATIC_URL = "static/"
LANGUAGE_CODE = "en"
# Django sets the process's zone to this one: any other would move Prefect's console by hours.
TIME_ZONE = "UTC"
USE_TZ = True

LOGGING = {
    "version": 1,
    # True would silence Prefect's own loggers, so that no run had logs in its UI.
    "disable_existing_loggers": False,
    "formatters": {"plain": {"format": "{asctime} {levelname} {name}: {message}", "style": "{"}},
    "handlers": {"console": {"class": "logging.StreamHandler", "formatter": "plain"}},
    "loggers": {"container_manager": {"handlers": ["console"], "level": os.environ.get("DJANGO_LOG_LEVEL", "WARNING")}},
}
