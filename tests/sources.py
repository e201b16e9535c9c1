"""The source files of the package."""

from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "rampde_fx"
# By the names of their modules; rampde_fx/passes is a link to passes/.
FILES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
    if "passes" not in path.relative_to(PACKAGE).parts
} | {f"rampde_fx.passes.{path.stem}": path for path in sorted((ROOT / "passes").glob("[!_]*.py"))}
assert len(FILES) > 80
