"""`advkd-cache`: the group of commands on trajectory caches."""

from __future__ import annotations

import click

from advkd.pipeline.cli.cache_advise import advise
from advkd.pipeline.cli.cache_build import build
from advkd.pipeline.cli.cache_combine import merge, subset
from advkd.pipeline.cli.cache_export import export, push
from advkd.pipeline.cli.cache_import import import_
from advkd.pipeline.cli.cache_look import diff, info, preview
from advkd.pipeline.cli.cache_pack import pack, unpack
from advkd.pipeline.cli.cache_verify import verify


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="advkd", message="%(prog)s %(version)s")
def main() -> None:
    """Build, inspect, verify, merge, cut, pack, import, export and publish trajectory caches."""


for _command in (advise, build, info, verify, merge, subset, pack, unpack, export, import_, push, preview, diff):
    main.add_command(_command)
