"""Adds to the site what the pages link to outside of docs/: README.md, experiments/, tpu_scripts/.

On GitHub the links go from file to file. In the site, docs/ is the root, so docs/train.md becomes
train.md and everything else keeps its path; this hook adds the files and adapts the links.
"""

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]

_AUDIO = re.compile(r'<a href="([^"]+\.opus)">[^<]*</a>')
_OPTIONS = 'controls controlslist="nodownload noplaybackrate" preload="none"'
_PLAYER = rf'<audio {_OPTIONS} src="\1"></audio>'
# Targets of [text](target), ![text](target), without those of other sites.
_LINK = re.compile(r"(\]\()(?![a-z]+:|#)([^)\s#]+)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds README.md and, from page to page, every file that is linked."""
    waiting = ["README.md", *(_to_source(file.src_uri) for file in files)]
    seen = set(waiting)
    while waiting:
        source = waiting.pop()
        uri = _to_site(source)
        if files.get_file_from_path(uri) is None:
            files.append(File.generated(config, uri, abs_src_path=str(ROOT / source)))
        if source.endswith(".md"):
            found = _LINK.findall((ROOT / source).read_text())
            linked = {_join(source, target) for _, target in found}
            new = {path for path in linked if (ROOT / path).is_file()} - seen
            seen |= new
            waiting += sorted(new)
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Adapts the links of a page."""
    del config, files
    source = _to_source(page.file.src_uri)
    folder = posixpath.dirname(page.file.src_uri)

    def adapted(match: re.Match) -> str:
        target = _join(source, match[2])
        return match[1] + posixpath.relpath(_to_site(target), folder or ".")

    return _LINK.sub(adapted, markdown)


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turns links to audio into players."""
    del page, config, files
    return _AUDIO.sub(_PLAYER, html)


def _join(source: str, target: str) -> str:
    return posixpath.normpath(posixpath.join(posixpath.dirname(source), target))


def _to_site(source: str) -> str:
    return source.removeprefix("docs/")


def _to_source(uri: str) -> str:
    """The path in the repository of a file of the site."""
    in_docs = f"docs/{uri}"
    return in_docs if (ROOT / in_docs).exists() else uri
