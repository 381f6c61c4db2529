#!/usr/bin/env python
import os
import sys


def main() -> None:
    os.environ.setdefault("DJANGO_SETTINGS_MODULE", "container_manager.settings")
    from django.core.exceptions import ImproperlyConfigured
    from django.core.management import execute_from_command_line

    try:
        execute_from_command_line(sys.argv)
    except (ImproperlyConfigured, ModuleNotFoundError) as e:
        # Wrong settings, which end every command before it begins.
        is_settings = isinstance(e, ImproperlyConfigured) or is_module_of(e, os.environ["DJANGO_SETTINGS_MODULE"])
        if not is_settings or "--traceback" in sys.argv:
            raise
        sys.exit(f"CommandError: {e}: correct it, then run `manage.py check`")


def is_module_of(missing: ModuleNotFoundError, name: str) -> bool:
    return f"{name}.".startswith(f"{missing.name}.")


if __name__ == "__main__":
    main()
