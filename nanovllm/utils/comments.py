"""What a class's source says of its fields, for those who read help and reference instead of the source."""

import inspect
import re


def field_comments(source: type) -> dict[str, str]:
    """The comment above or beside each field that the class itself declares, as the rest of a sentence; "" for none."""
    comments, above = {}, []
    for line in map(str.strip, inspect.getsource(source).splitlines()):
        if line.startswith("# "):
            above.append(line[2:])
            continue
        match = re.match(r"(\w+): .*?(?:  # (.*))?$", line)
        if match and match[1] in source.__annotations__:
            text = " ".join(above).rstrip(".") or match[2] or ""
            comments[match[1]] = re.sub(r"^(?!None\b)[A-Z](?=[a-z ])", lambda first: first[0].lower(), text)
        above = []
    return comments
