"""What all our commands share: a user's mistake is one line and exit status 2."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

from mergekit_align.errors import InputError


class InputErrorMessage(click.ClickException):
    """An `InputError` as click prints it."""

    exit_code = 2


class InputErrorAsUsage(click.Command):
    """A command whose `InputError`s become one line on standard error and exit status 2."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except InputError as error:
            raise InputErrorMessage(str(error)) from error


def command(name: str) -> Callable[[Callable[..., Any]], click.Command]:
    """`click.command` for our commands."""
    return click.command(name, cls=InputErrorAsUsage, context_settings={"max_content_width": 100})
