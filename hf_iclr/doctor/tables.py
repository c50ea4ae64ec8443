"""What `hf-iclr doctor` prints: the machine, the packages, what works, and the upstream code we lean on."""

from rich.markup import escape
from rich.table import Table

from hf_iclr.doctor.environment import Package, packages
from hf_iclr.doctor.report import BROKEN, MISSING, WORKS, Finding
from hf_iclr.upstream import SEAMS


_COLOURS = {WORKS: "green", MISSING: "yellow", BROKEN: "red"}


def is_healthy(findings: dict[str, Finding]) -> bool:
    """Whether all that is installed works: no job is broken, no seam is gone, nothing but extras is missing."""
    vanished = [name for name, _, found in findings["seams"].result or [] if found is None]
    broken = any(finding.status == BROKEN for finding in findings.values())
    return not broken and not vanished and all(package.installed or package.extra for package in packages())


def machine_table(findings: dict[str, Finding]) -> Table:
    """Python, system, devices."""
    table = Table("", "", title="Machine", title_justify="left", show_header=False)
    for name, value in (findings["machine"].result or {"": _verdict(findings["machine"])}).items():
        table.add_row(name, str(value))
    return table


def package_table() -> Table:
    """Wanted and installed versions."""
    table = Table("package", "of", "wanted", "installed", "", title="Packages", title_justify="left")
    for package in packages():
        extra = f"[{package.extra}]" if package.extra else ""
        table.add_row(
            package.name, escape(extra), package.wanted, package.installed or "none", _package_verdict(package)
        )
    return table


def _package_verdict(package: Package) -> str:
    if package.ok:
        return "[green]ok[/]"
    if package.installed is not None:
        return "[yellow]not tested[/]"
    return f"[{'yellow' if package.extra else 'red'}]none[/], {escape(package.command)}"


def part_table(findings: dict[str, Finding]) -> Table:
    """What works, what is broken by whom, and what to type for what is missing."""
    table = Table("part", "seconds", "", title="Parts, run on tiny models", title_justify="left")
    for finding in findings.values():
        if finding.title not in ("machine", "seams"):
            table.add_row(finding.title, f"{finding.seconds:.1f}", _verdict(finding))
    return table


def seam_table(findings: dict[str, Finding], show_all: bool) -> Table | str:
    """The upstream code we lean on that has changed, or all of it; one line where all is as expected."""
    finding = findings["seams"]
    seams = finding.result or []
    changed = [(name, expected, found) for name, expected, found in seams if found != expected]
    title = f"Upstream code we lean on: {len(seams) - len(changed)} of {len(seams)} functions as expected"
    if finding.status == BROKEN or not (changed or show_all):
        return f"{title}. {_verdict(finding)}" if finding.status == BROKEN else f"{title}; --seams lists them."
    table = Table("upstream", "", title=f"{title}.", title_justify="left", min_width=len(title) + 1)
    for name, expected, found in seams if show_all else changed:
        word = "[green]ok[/]" if found == expected else "[red]gone[/]" if found is None else "[yellow]changed[/]"
        change = "" if found == expected else f"\nexpected {escape(expected)}\n   found {escape(found or 'nothing')}"
        reason = f"\n[dim]{escape(SEAMS[name].reason)}[/]" if name in SEAMS else ""
        table.add_row(name.partition(":")[2] + reason, word + change)
    return table


def _verdict(finding: Finding) -> str:
    said = f" {escape(finding.sentence)}" if finding.sentence else ""
    error = f"\n[dim]{escape(finding.error[:200])}[/]" if finding.status == BROKEN else ""
    return f"[{_COLOURS[finding.status]}]{finding.status}[/]{said}{error}"
