"""A hook of mkdocs: pages outside docs/ belong to the site, and links work as on GitHub, where paths are the tree's."""

import os
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
OUTSIDE = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "CITATION.cff", "LICENSE", "recipes/README.md")
OUTSIDE += (
    "benchmarks/README.md",
    *(f"benchmarks/results/{path.name}" for path in ROOT.glob("benchmarks/results/*.json")),
)
LINK = re.compile(r"(?<=\]\()(?!https?:|#|mailto:)([^)#\s]*)(#[^)\s]*)?(?=\))")


def on_files(files: Files, config: Any) -> Files:
    """Adds the pages outside docs/ under their paths in the repository."""
    for path in OUTSIDE:
        file = File.generated(config, path, abs_src_path=str(ROOT / path))
        if path == "README.md":
            file.dest_uri = file.url = "readme.html"  # docs/index.md is the site's index.html
        files.append(file)
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Links of a page, from the tree's paths to the site's, where docs/ is the root."""
    source = page.file.src_uri
    here = Path(source if source in OUTSIDE else f"docs/{source}").parent

    def on_site(found: re.Match[str]) -> str:
        target = os.path.normpath(here / found[1]).removeprefix("docs/")
        return os.path.relpath(target, Path(source).parent) + (found[2] or "")

    return LINK.sub(on_site, markdown)
