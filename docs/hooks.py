"""Brings pages from outside `docs/` (benchmarks, contributing, changes) into the site, and turns links to them.

The pages are plain markdown, so that they can be read where the code is, too: there, a page of `docs/` reaches a
benchmark as `../benchmarks/...`; in the site the benchmarks are below the pages.
"""

import re
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
PAGES = ["CONTRIBUTING.md", "CHANGELOG.md"]
LINK = re.compile(r"(!?)\[([^\]]*)\]\((?!\w+:|#)([^)\s]+)\)")


def on_files(files, config):
    outside = [ROOT / name for name in PAGES]
    outside += [path for suffix in ("md", "png") for path in (ROOT / "benchmarks").rglob(f"*.{suffix}")]
    for path in outside:
        files.append(File.generated(config, path.relative_to(ROOT).as_posix(), abs_src_path=str(path)))
    return files


def on_page_markdown(markdown, page, config, files):
    return LINK.sub(lambda link: _turn(link, page.file.src_uri, files), markdown)


def _turn(link, source, files):
    """A link as the site needs it; only its text where the site has no such page (a recipe, a file of the code)."""
    image, text, address = link.groups()
    path, mark, anchor = address.partition("#")
    folder = ROOT / "docs" if (ROOT / "docs" / source).exists() else ROOT
    target = ((folder / source).parent / path).resolve()
    if not target.exists():
        return link[0]  # the strict build says what is broken
    name = target.relative_to(ROOT / "docs" if target.is_relative_to(ROOT / "docs") else ROOT).as_posix()
    if name == "README.md":
        name, mark, anchor = "index.md", "", ""  # the site's first page has other headings
    name = f"{name}/README.md" if target.is_dir() else name
    if files.get_file_from_path(name) is None:
        return text
    return f"{image}[{text}]({'../' * source.count('/')}{name}{mark}{anchor})"
