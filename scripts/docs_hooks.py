"""Hooks of mkdocs: the site also holds the Markdown outside docs/ that pages link to, such as LOG.md and reports."""

from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
PATTERNS = (
    "LOG.md",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "accelerate_configs/README.md",
    "a3_hf/evaluation/tasks/README.md",
    "recipes/*/README.md",
    "eval/results/**/*.md",
    "eval/results/**/*.png",
)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the files of `PATTERNS` at their paths in the repository."""
    for path in sorted(path for pattern in PATTERNS for path in ROOT.glob(pattern)):
        name = path.relative_to(ROOT).as_posix()
        files.append(File(name, str(ROOT), config.site_dir, config.use_directory_urls))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turns links out of docs/ (`../LOG.md`) and into it (`../../docs/decoding.md`) into links within the site, where docs/ is
    the root.
    """
    if page.file.src_dir == config.docs_dir:
        return markdown.replace("](../", "](")
    return markdown.replace("../docs/", "../")
