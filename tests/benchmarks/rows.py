"""Many rows at once, by the database itself: a million of them through the ORM would take minutes."""

from typing import Any

from django.db import connection, transaction

from container_manager.models import ContainerJob, DockerHost, Installation, JobAttempt

TABLE = ContainerJob._meta.db_table
#: An expression of the number of the row, from 1.
NUMBER = "n"


def empty() -> None:
    with connection.cursor() as cursor:
        if connection.vendor == "postgresql":
            cursor.execute(f"TRUNCATE {TABLE}, {JobAttempt._meta.db_table} RESTART IDENTITY CASCADE")
        else:
            cursor.execute(f"DELETE FROM {JobAttempt._meta.db_table}")
            cursor.execute(f"DELETE FROM {TABLE}")
    DockerHost.objects.all().delete()
    Installation.objects.all().delete()
    Installation.load()


def copies(count: int, **changes: str) -> None:
    """`count` rows like a job that `create_job` saves, with these columns as SQL expressions (of `n`)."""
    template = ContainerJob.objects.create_job(image="busybox", command=["true"])
    columns = [field.column for field in ContainerJob._meta.fields if not field.primary_key]
    values = [changes.get(column, f'j."{column}"') for column in columns]
    names = ", ".join(f'"{column}"' for column in columns)
    if connection.vendor == "postgresql":
        numbers = f"generate_series(1, {count}) AS {NUMBER}"
        prefix = ""
    else:
        prefix = f"WITH RECURSIVE numbers(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM numbers WHERE n < {count}) "
        numbers = "numbers"
    with transaction.atomic(), connection.cursor() as cursor:
        cursor.execute(
            f"INSERT INTO {TABLE} ({names}) {prefix}"
            f"SELECT {', '.join(values)} FROM {TABLE} j, {numbers} WHERE j.id = %s",
            [template.pk],
        )
    template.delete()


def analyze() -> None:
    """As autovacuum would have done by the time that a table is this large."""
    with connection.cursor() as cursor:
        cursor.execute("VACUUM ANALYZE" if connection.vendor == "postgresql" else "ANALYZE")


def moment(seconds: str) -> str:
    """A time as an SQL expression: now and these seconds, themselves an expression."""
    if connection.vendor == "postgresql":
        return f"now() + make_interval(secs => {seconds})"
    return f"strftime('%Y-%m-%d %H:%M:%f', 'now', ({seconds}) || ' seconds')"


def fetch(sql: str, *parameters: Any) -> list[Any]:
    with connection.cursor() as cursor:
        cursor.execute(sql, parameters)
        return list(cursor.fetchall())
