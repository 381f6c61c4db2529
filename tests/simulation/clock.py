"""Time by the database's clock, which is the machine's: to let it pass is to have everything happen earlier."""

from datetime import timedelta

from django.db.models import DateTimeField, F, Model

from container_manager.models import ContainerJob, DockerHost, Installation, JobAttempt

#: By the Engine's clock.
_NOT_OURS = ("started_at", "finished_at")


def let_time_pass(seconds: float) -> None:
    for model in (ContainerJob, DockerHost, Installation, JobAttempt):
        not_ours = _NOT_OURS if model is JobAttempt else ()
        model.objects.update(
            **{name: F(name) - timedelta(seconds=seconds) for name in _times_of(model) if name not in not_ours}
        )


def _times_of(model: type[Model]) -> list[str]:
    return [field.name for field in model._meta.concrete_fields if isinstance(field, DateTimeField)]
