from typing import Any

from django.apps import AppConfig
from django.db.models.signals import post_migrate


class ContainerManagerConfig(AppConfig):
    name = "container_manager"
    verbose_name = "Container Manager"
    default_auto_field = "django.db.models.BigAutoField"

    def ready(self) -> None:
        from . import checks  # noqa: F401 (registers the checks; needs the registry of apps)

        post_migrate.connect(_make_default_host, sender=self)


def _make_default_host(*, using: str, plan: Any = (), **kwargs: Any) -> None:
    """With the app's tables comes a host for the Engine of this machine. Who deletes it is not given it again."""
    initial = ("container_manager", "0001_initial")
    if not any((step.app_label, step.name) == initial and not is_backwards for step, is_backwards in plan):
        return
    from .models import DockerHost

    DockerHost.objects.using(using).get_or_create(name="local")
