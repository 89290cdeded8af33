"""JSON schemas of the kinds that people ask for."""

TEXT, NAME, INTEGER, NUMBER, FLAG = (
    {"type": "string", "maxLength": 30}, {"type": "string", "minLength": 1, "maxLength": 12}, {"type": "integer"},
    {"type": "number"}, {"type": "boolean"},
)  # fmt: skip


def record(optional: tuple[str, ...] = (), **properties: object) -> dict:
    """An object with these properties and no others."""
    required = [name for name in properties if name not in optional]
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


def several(items: object, least: int = 0, most: int = 3) -> dict:
    return {"type": "array", "items": items, "minItems": least, "maxItems": most}


def string(**rules: object) -> dict:
    return {"type": "string", **rules}


def whole(least: int, most: int) -> dict:
    return {"type": "integer", "minimum": least, "maximum": most}


ADDRESS = record(street=TEXT, city=NAME, postal_code=string(pattern="^[0-9]{5}(-[0-9]{4})?$"))
TREE = record(("children",), value=whole(0, 9), children=several({"$ref": "#/$defs/node"}, 0, 2))
COMMENT = record(("replies",), author=NAME, text=TEXT, replies=several({"$ref": "#"}, 0, 1))
SHAPES = {
    "circle": record(kind={"const": "circle"}, radius={"type": "number", "exclusiveMinimum": 0}),
    "square": record(kind={"const": "square"}, side={"type": "number", "minimum": 0.5, "maximum": 99.5}),
}
OPERATION = {"anyOf": [whole(0, 99), record(op={"enum": ["+", "-"]}, left={"$ref": "#"}, right={"$ref": "#"})]}

SCHEMAS = {
    "sentiment": record(sentiment={"enum": ["positive", "negative", "neutral"]}, confidence=NUMBER),
    "person": record(name=NAME, age=whole(0, 150), email=string(format="email")),
    "optional": record(("nickname", "phone"), name=NAME, nickname=NAME, phone=string(pattern=r"^\+?[0-9]{7,15}$")),
    "nested": record(customer=record(name=NAME, address=ADDRESS), total=NUMBER, is_paid=FLAG),
    "invoice": record(
        number=string(pattern="^INV-[0-9]{6}$"), date=string(format="date"),
        lines=several(record(sku=NAME, qty=INTEGER), 1),
    ),
    "null union": record(middle_name={"type": ["string", "null"], "maxLength": 9}, score={"type": ["number", "null"]}),
    "any of": record(value={"anyOf": [INTEGER, {"type": "string", "maxLength": 5}, {"type": "null"}]}),
    "discriminated": {"anyOf": list(SHAPES.values())},
    "one of": {"oneOf": list(SHAPES.values())},
    "tool call": {
        "anyOf": [
            record(tool={"const": "search"}, arguments=record(query=TEXT, limit=whole(1, 20))),
            record(tool={"const": "calculator"}, arguments=record(expression=string(pattern=r"^[0-9+*/() -]{1,12}$"))),
        ]
    },
    "references": {"$defs": {"point": record(x=INTEGER, y=INTEGER)}} | record(a={"$ref": "#/$defs/point"}, b=FLAG),
    "tree": {"$defs": {"node": TREE}, "$ref": "#/$defs/node"},
    "comments": COMMENT,
    "expression": OPERATION,
    "array of enums": several({"enum": ["red", "green", "blue"]}, 2, 5),
    "matrix": several(several(whole(-9, 9), 3, 3), 2, 2),
    "tuple": {"type": "array", "prefixItems": [NAME, INTEGER, FLAG], "items": False, "minItems": 3},
    "formats": record(
        day=string(format="date"), at=string(format="time"), ip=string(format="ipv4"), id=string(format="uuid")
    ),
    "moment": record(start=string(format="date-time"), host=string(format="hostname")),
    "bounds": record(percent={"type": "number", "minimum": 0, "maximum": 100}, year=whole(1900, 2100)),
    "multiple": record(price={"type": "integer", "multipleOf": 5, "minimum": 0, "maximum": 1000}),
    "constants": record(version={"const": 2}, unit={"const": "€"}, quote={"const": 'a "b"\n'}),
    "mixed enum": record(level={"enum": [1, "two", None, True, 2.5]}),
    "map": {"type": "object", "additionalProperties": whole(0, 9), "maxProperties": 3},
    "keys by pattern": {
        "type": "object", "patternProperties": {"^x_[a-z]{1,3}$": INTEGER}, "additionalProperties": False,
        "maxProperties": 2,
    },
    "open object": {"type": "object", "properties": {"id": INTEGER}, "required": ["id"], "maxProperties": 2},
    "all of": {"allOf": [{"type": "object", "properties": {"a": INTEGER}, "required": ["a"]}, record(a=whole(3, 7))]},
    "long keys": record(
        the_first_name_of_the_customer=NAME, the_last_name_of_the_customer=NAME, has_agreed_to_the_conditions=FLAG
    ),
    "entities": several(record(text=NAME, label={"enum": ["PER", "ORG", "LOC"]}, start=whole(0, 999)), 1, 2),
    "described": record(summary={"title": "Summary", "description": "One line.", "default": "", **TEXT}, done=FLAG),
    "words": record(slug=string(pattern=r"^\w{1,8}(-\w{1,8}){0,2}$"), code=string(pattern="^[A-Z]{2}\\d{3}$")),
}  # fmt: skip
