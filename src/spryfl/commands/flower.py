"""Commands for real federations on Flower: `spryfl flower init | certs | doctor | same`. They start nothing."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Annotated

import typer

from spryfl.commands import Config, Set, app, changed_by, err, out

flower = typer.Typer(
    help="The same experiment on Flower: in simulation, or at sites with TLS and node keys.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
app.add_typer(flower, name="flower")


@flower.callback()
def _extra() -> None:
    if importlib.util.find_spec("cryptography") is None:
        raise ValueError('`spryfl flower` needs an extra that is not installed: pip install "spryfl[flower]"')


Insecure = Annotated[bool, typer.Option("--insecure", help="Plain HTTP, no keys; on loopback alone.")]


@flower.command()
def init(
    folder: Annotated[Path, typer.Argument(help="A new folder for the app.")],
    config: Config = None,
    set_: Set = None,
    superlink: Annotated[str, typer.Option(help="HOST:PORT of the SuperLink, as the sites will type it.")] = "",
    tls: Annotated[Path | None, typer.Option(help="Folder of certificates and keys; DIR/tls without it.")] = None,
    insecure: Insecure = False,
) -> None:
    """Write the app folder of an experiment and say which commands to type. Without --config: the defaults."""
    from spryfl.config import Experiment
    from spryfl.sites import folder as folders
    from spryfl.sites import hashes, typed

    experiment = Experiment.load(config, changed_by({}, set_))
    if insecure and tls:
        raise ValueError("--insecure has no effect beside --tls. Remove one of them.")
    keys = None if insecure else tls or folder / "tls"
    made = typed.federation(folder, superlink or f"127.0.0.1:{typed.PORT}", keys)
    weights, labels = hashes.weights(experiment), folders.classes(experiment)
    folders.init(folder, experiment, made, weights, labels)
    out.print(f"folder  {folder}: pyproject.toml, experiment.toml, {typed.HOME}/config.toml", soft_wrap=True)
    if not weights:
        out.print(f"note    model {experiment.model.name} is not on this machine, so its hash is not noted")
    if not labels:
        out.print(f"note    data {experiment.data.name} are not on this machine, so the classes are not noted")
    _tell(folders.walk(made, experiment), typed.environment(folder))


def _tell(steps: list, environment: dict[str, str]) -> None:
    """The commands to type, of many sites the first two and the last."""
    from spryfl.sites import typed

    print("\n# in every terminal")
    for name, value in environment.items():
        print(typed.line(["export", f"{name}={value}"]))
    sites = [step for step in steps if step.site is not None]
    left_out = [step for step in sites if 1 < step.site < max(one.site for one in sites)]
    last = ""
    for step in steps:
        if step in left_out:
            continue
        if step.where != last:
            print(f"\n# {step.where}: {step.why}")
        last = step.where
        print(typed.line(step.words))


@flower.command()
def certs(
    folder: Annotated[Path, typer.Argument(help="A new folder for the certificates and keys.")],
    nodes: Annotated[int, typer.Option(help="How many sites get a key pair.")],
    host: Annotated[list[str], typer.Option(help="Name or IP of the SuperLink's machine. May be repeated.")],
    days: Annotated[int, typer.Option(help="How long the certificates are good.")] = 90,
) -> None:
    """Make a CA, the server's certificate and node keys, for trying out. Private keys are readable by you alone."""
    from spryfl.sites import certs as making

    made = making.make(folder, nodes, host, days)
    out.print(f"folder  {folder}: {', '.join(path.name for path in made)}", soft_wrap=True)
    print((folder / "README.txt").read_text(encoding="utf-8"), end="")


@flower.command()
def same(
    one: Annotated[Path, typer.Argument(help="A run folder.")],
    other: Annotated[Path, typer.Argument(help="Another one.")],
) -> None:
    """Whether two runs ended in the same bits: state, adapter, records but for times and bytes. Exit code 2 if not."""
    from spryfl.sites import bits

    found = bits.differences(one, other)
    for difference in found:
        err.print(f"wrong  {difference}", soft_wrap=True)
    if found:
        raise typer.Exit(2)
    out.print(f"ok     {one} and {other} ended in the same bits", soft_wrap=True)


@flower.command()
def doctor(
    folder: Annotated[Path | None, typer.Argument(help="An app folder, to compare this machine with.")] = None,
    superlink: Annotated[str, typer.Option(help="HOST:PORT of the SuperLink.")] = "",
    root_certificates: Annotated[Path | None, typer.Option(help="The CA's certificate, ca.crt.")] = None,
    key: Annotated[Path | None, typer.Option(help="This site's private key, node<i>.")] = None,
    data: Annotated[Path | None, typer.Option(help="This site's file of rows.")] = None,
    insecure: Insecure = False,
) -> None:
    """Check versions, noise, model, data, key and the way to the SuperLink, before a long run; exit code 2 if wrong."""
    from spryfl.sites import doctor as checks

    found = list(checks.examine(folder, superlink, root_certificates, key, data, insecure))
    for one in found:
        out.print(f"{one.state:<6} {one.what}: {one.said}", soft_wrap=True)
        if one.do:
            out.print(f"       {one.do}", soft_wrap=True)
    wrong = sum(one.state == checks.WRONG for one in found)
    if wrong:
        err.print(f"{wrong} of {len(found)} checks are wrong", style="red")
        raise typer.Exit(2)
