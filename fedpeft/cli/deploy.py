"""`fedpeft server` and `fedpeft site`. Nothing heavy is imported before a command needs it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from fedpeft.cli import console

server_app = typer.Typer(no_args_is_help=True, help="The coordinator of real sites: gRPC over TLS, keys, runs.")
site_app = typer.Typer(no_args_is_help=True, help="A site: its keys, its policy, its data, its worker.")

Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Dir = Annotated[Path, typer.Argument(metavar="DIR", help="The coordinator's folder.")]
SiteDir = Annotated[Path, typer.Argument(metavar="DIR", help="The site's folder.")]
Run = Annotated[str, typer.Argument(metavar="RUN", help="A run, as `server status` shows it, or last.")]
Insecure = Annotated[bool, typer.Option("--insecure", help="No TLS, no authentication: for tests on one machine only.")]


@server_app.command("init")
def server_init(
    folder: Dir,
    host: Annotated[str, typer.Option(help="Name or address by which sites reach this machine.")],
    port: Annotated[int, typer.Option(help="Fleet port, the one that sites need.")] = 9092,
    control_port: Annotated[int, typer.Option(help="Control port, on 127.0.0.1 only.")] = 9093,
    listen: Annotated[str, typer.Option(help="Address that the ports for sites are bound to.")] = "0.0.0.0",
    http_port: Annotated[int | None, typer.Option(help="Port for sites behind a web proxy; none if not given.")] = None,
    as_json: Json = False,
) -> None:
    """Make a coordinator: its authority, its certificate, its settings."""
    from fedpeft.deploy.coordinator import server

    console.emit(server.init(folder, host, port, control_port, listen, http_port), as_json, console.pairs)


@server_app.command("renew")
def server_renew(folder: Dir, as_json: Json = False) -> None:
    """Make the server's certificate anew, with the same keys and authority; sites need nothing new."""
    from fedpeft.deploy.coordinator import server

    console.emit(server.renew(folder), as_json, console.pairs)


@server_app.command("start")
def server_start(folder: Dir, insecure: Insecure = False) -> None:
    """Serve sites and go on with unfinished runs, until stopped."""
    from fedpeft.deploy.coordinator.daemon import serve

    serve(folder, insecure)


@server_app.command("add-site")
def server_add_site(
    folder: Dir,
    name: Annotated[str, typer.Argument(metavar="NAME", help="The site's name, as in its site.yaml.")],
    public_key: Annotated[str, typer.Argument(metavar="PUBLIC_KEY", help="Its public key, or a file with it.")],
    as_json: Json = False,
) -> None:
    """Let a site in; also in mid-run."""
    from fedpeft.deploy.coordinator import server

    console.emit(server.add_site(folder, name, public_key), as_json, console.pairs)


@server_app.command("sites")
def server_sites(
    folder: Dir,
    wait: Annotated[
        int | None,
        typer.Option(min=0, help="First wait until the coordinator answers and so many sites are connected."),
    ] = None,
    as_json: Json = False,
) -> None:
    """List the sites and whether they are connected."""
    from fedpeft.cli import deploy_tables
    from fedpeft.deploy.coordinator import server

    result = server.sites(folder) if wait is None else server.await_sites(folder, wait)
    console.emit(result, as_json, deploy_tables.sites)


@server_app.command("run")
def server_run(
    folder: Dir,
    config: Annotated[str, typer.Argument(metavar="CONFIG", help="A YAML file, or the name of a shipped config.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Dotted overrides.")] = None,
    detach: Annotated[
        bool, typer.Option("--detach/--wait", help="Return at once; the run goes on. Or wait for its end.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Submit a run, print its name and watch it; Ctrl-C ends the watching, not the run."""
    from fedpeft.cli import deploy_tables
    from fedpeft.deploy.coordinator import server

    submitted = server.run(folder, config, overrides or [])
    if not detach:
        if not as_json:
            # At once: whoever ends the watching needs the name to see it again.
            console.note(f"run {submitted['run']}: submitted.")
        with deploy_tables.FleetWatch(folder, submitted["run"], quiet=as_json) as watch:
            submitted |= server.wait(folder, submitted["run"], watch)
    console.emit(submitted, as_json, deploy_tables.run)


@server_app.command("status")
def server_status(
    folder: Dir,
    run: Annotated[str | None, typer.Argument(metavar="[RUN]", help="One run, or last; default is all.")] = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Watch this run until it has ended.")] = False,
    as_json: Json = False,
) -> None:
    """Show sites and runs: rounds, who took part, who was left out and why."""
    from fedpeft.cli import deploy_tables
    from fedpeft.deploy.coordinator import server

    if follow and run:
        with deploy_tables.FleetWatch(folder, run, quiet=as_json) as watch:
            server.wait(folder, run, watch)
    console.emit(server.status(folder, run), as_json, deploy_tables.status)


@server_app.command("logs")
def server_logs(
    folder: Dir,
    run: Annotated[
        str | None, typer.Argument(metavar="[RUN]", help="Name, or last; default: what sites reach.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Print the log of a run, or of what sites reach."""
    from fedpeft.cli import deploy_tables
    from fedpeft.deploy.coordinator import server

    console.emit({"log": server.logs(folder, run)}, as_json, deploy_tables.text)


@server_app.command("stop")
def server_stop(folder: Dir, run: Run, as_json: Json = False) -> None:
    """Stop a run; what it has reached stays in its folder."""
    from fedpeft.deploy.coordinator import server

    console.emit(server.stop(folder, run), as_json, console.pairs)


@server_app.command("fetch")
def server_fetch(
    folder: Dir,
    run: Run,
    to: Annotated[Path, typer.Option(help="Target folder; new or empty.")],
    as_json: Json = False,
) -> None:
    """Copy a finished run's adapter, metrics and report."""
    from fedpeft.deploy.coordinator import server

    console.emit(server.fetch(folder, run, to), as_json, console.pairs)


@site_app.command("init")
def site_init(
    folder: SiteDir,
    name: Annotated[str, typer.Option(help="Name of the site, agreed on with the coordinator.")],
    server: Annotated[str, typer.Option(help="HOST:PORT of the coordinator.")],
    ca: Annotated[Path | None, typer.Option(help="The coordinator's ca.crt.")] = None,
    data: Annotated[str | None, typer.Option(help="File or folder with this site's records.")] = None,
    model: Annotated[str, typer.Option(help="Base model: embedded, prepared, or a local folder.")] = "tiny-vit",
    as_json: Json = False,
) -> None:
    """Make a site: its key pair is born here; prints the public key for the coordinator."""
    from fedpeft.deploy.site import site

    result: dict[str, Any] = site.init(folder, name, server, ca, data, model)
    console.emit(result, as_json, console.pairs)


@site_app.command("check")
def site_check(folder: SiteDir, as_json: Json = False) -> None:
    """Check policy, keys, data, model, whether both agree, server and clock; exit code 1 if any is not in order."""
    from fedpeft.cli import deploy_tables
    from fedpeft.deploy.site import site

    result = site.check(folder)
    console.emit(result, as_json, deploy_tables.checks)
    if not result["ok"]:
        raise typer.Exit(1)


@site_app.command("policy")
def site_policy(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A policy file, or a folder of them.")],
    as_json: Json = False,
) -> None:
    """Print what a policy allows, and what it leaves open."""
    from fedpeft.cli import deploy_tables
    from fedpeft.deploy.site import site

    console.emit(site.policy(file), as_json, deploy_tables.policies)


@site_app.command("start")
def site_start(
    folder: SiteDir,
    insecure: Insecure = False,
    debug: Annotated[bool, typer.Option("--debug", help="Log where failures happen, and unanswered calls.")] = False,
) -> None:
    """Take part in the coordinator's runs, within the policy, until stopped."""
    from fedpeft.deploy.site.site import start

    start(folder, insecure, debug)


@site_app.command("status")
def site_status(folder: SiteDir, as_json: Json = False) -> None:
    """Show whether the site runs, when the coordinator last answered it, and what is in the way."""
    from fedpeft.deploy.site import site

    console.emit(site.status(folder), as_json, console.pairs)
