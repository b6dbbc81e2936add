"""A hook of mkdocs: links to files of the repository that are not pages of the site.

In the repository such a link opens the file. The site does not hold it, so the link becomes its
text. A link to a file that does not exist stays, and the strict build fails on it.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

LINK = re.compile(r"(?<!!)\[([^\]\n]+)\]\((\.\./[^)\s#]+)\)")


def on_page_markdown(markdown: str, *, page: Any, config: Any, **_: Any) -> str:
    """The page's text, in which files outside of the site are text and not links."""
    folder, site = Path(page.file.abs_src_path).parent, Path(config.docs_dir)

    def text(link: re.Match[str]) -> str:
        target = (folder / link[2]).resolve()
        outside = not target.is_relative_to(site) and target.exists()
        return f"`{link[1]}`" if outside else link[0]

    return LINK.sub(text, markdown)
