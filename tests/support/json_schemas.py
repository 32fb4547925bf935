"""JSON schemas as clients send them, and as nobody should. By name; what they are good for is decided by whoever uses them."""

from __future__ import annotations

from typing import Any

Schema = dict[str, Any]


def _object(properties: Schema, required: list[str] | None = None, **more: Any) -> Schema:
    names = list(properties) if required is None else required
    return {"type": "object", "properties": properties, "required": names, "additionalProperties": False, **more}


STRING, INTEGER, NUMBER, BOOLEAN = ({"type": name} for name in ("string", "integer", "number", "boolean"))
_ADDRESS = _object({"street": STRING, "zip": {"type": "string", "pattern": "^[0-9]{5}$"}})
_TREE = {
    "$ref": "#/$defs/node",
    "$defs": {"node": _object({"v": INTEGER, "kids": {"type": "array", "items": {"$ref": "#/$defs/node"}, "maxItems": 2}})},
}
_LINKED = {
    "$ref": "#/$defs/n",
    "$defs": {"n": _object({"v": BOOLEAN, "next": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/n"}]}})},
}
_EXPRESSION = {
    "$ref": "#/$defs/e",
    "$defs": {
        "e": {
            "anyOf": [
                INTEGER,
                _object({"op": {"enum": ["+", "-"]}, "left": {"$ref": "#/$defs/e"}, "right": {"$ref": "#/$defs/e"}}),
            ]
        }
    },
}


def _nested(levels: int) -> Schema:
    schema: Schema = {"type": "integer"}
    for _ in range(levels):
        schema = _object({"a": schema})
    return schema


# Each of these compiles, and every whole answer is valid.
USUAL: dict[str, Schema] = {
    "anything": {},
    "any object": {"type": "object"},
    "any array": {"type": "array"},
    "string": STRING,
    "integer": INTEGER,
    "number": NUMBER,
    "boolean": BOOLEAN,
    "null": {"type": "null"},
    "several types": {"type": ["string", "integer", "null"]},
    "const number": {"const": 42},
    "const string": {"const": 'quote " and \\ and \n'},
    "const object": {"const": {"a": [1, "x", None, True]}},
    "const unicode": {"const": "Grüße, 世界 🌍"},
    "enum of strings": {"enum": ["red", "green", "blue"]},
    "enum of kinds": {"enum": [1, "one", None, True, 1.5, [], {}]},
    "enum of prefixes": {"enum": ["a", "ab", "abc", "b"]},
    "enum of unicode": {"enum": ["é", "世", "🌍", "\u2028", "a\tb"]},
    "enum of 500": {"enum": [f"value {index}" for index in range(500)]},
    "enum in a type": {"type": "string", "enum": ["x", "y"]},
    "short string": {"type": "string", "maxLength": 3},
    "string of a length": {"type": "string", "minLength": 4, "maxLength": 4},
    "long enough string": {"type": "string", "minLength": 5},
    "empty string": {"type": "string", "maxLength": 0},
    "pattern of digits": {"type": "string", "pattern": "^[0-9]+$"},
    "pattern of a date": {"type": "string", "pattern": r"^\d{4}-\d{2}-\d{2}$"},
    "pattern of alternatives": {"type": "string", "pattern": "^(cat|dog|bird)$"},
    "pattern anywhere": {"type": "string", "pattern": "needle"},
    "pattern of a start": {"type": "string", "pattern": "^ab"},
    "pattern with quotes": {"type": "string", "pattern": '^"[a-z]*"$'},
    "pattern of backslashes": {"type": "string", "pattern": r"^\\+$"},
    "pattern of unicode": {"type": "string", "pattern": "^[à-ü]{1,5}$"},
    "pattern of e-mail": {"type": "string", "pattern": r"^[a-z0-9._]+@[a-z0-9-]+\.[a-z]{2,4}$"},
    "format date": {"type": "string", "format": "date"},
    "format date-time": {"type": "string", "format": "date-time"},
    "format time": {"type": "string", "format": "time"},
    "format uuid": {"type": "string", "format": "uuid"},
    "format email": {"type": "string", "format": "email"},
    "format ipv4": {"type": "string", "format": "ipv4"},
    "format uri": {"type": "string", "format": "uri"},
    "bounded integer": {"type": "integer", "minimum": -5, "maximum": 17},
    "integer from": {"type": "integer", "minimum": 100},
    "integer to": {"type": "integer", "maximum": -3},
    "exclusive integer": {"type": "integer", "exclusiveMinimum": 0, "exclusiveMaximum": 10},
    "one integer": {"type": "integer", "minimum": 7, "maximum": 7},
    "large integer": {"type": "integer", "minimum": 10**12, "maximum": 10**12 + 5},
    "bounded number": {"type": "number", "minimum": 0.5, "maximum": 2.25},
    "exclusive number": {"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 1},
    "negative number": {"type": "number", "maximum": -0.001},
    "close bounds": {"type": "number", "minimum": 0.1, "maximum": 0.3},
    "multiple of": {"type": "integer", "multipleOf": 7},
    "multiple of tenths": {"type": "number", "multipleOf": 0.1, "minimum": 0, "maximum": 5},
    "multiple within": {"type": "integer", "multipleOf": 5, "minimum": 3, "maximum": 22},
    "array of integers": {"type": "array", "items": INTEGER},
    "short array": {"type": "array", "items": BOOLEAN, "maxItems": 2},
    "array of a length": {"type": "array", "items": {"enum": ["a", "b"]}, "minItems": 3, "maxItems": 3},
    "empty array": {"type": "array", "maxItems": 0},
    "tuple": {"type": "array", "prefixItems": [INTEGER, STRING], "items": False, "minItems": 2},
    "open tuple": {"type": "array", "prefixItems": [INTEGER], "items": STRING, "minItems": 1},
    "array of arrays": {"type": "array", "items": {"type": "array", "items": INTEGER, "maxItems": 2}, "maxItems": 3},
    "person": _object({"name": STRING, "age": {"type": "integer", "minimum": 0, "maximum": 120}}),
    "optional property": _object({"a": INTEGER, "b": BOOLEAN}, ["a"]),
    "all optional": _object({"a": INTEGER, "b": BOOLEAN, "c": {"type": "null"}}, []),
    "open object": {"type": "object", "properties": {"a": INTEGER}, "required": ["a"]},
    "typed additions": {"type": "object", "properties": {"a": INTEGER}, "additionalProperties": INTEGER},
    "map": {"type": "object", "additionalProperties": {"type": "array", "items": INTEGER}},
    "no properties": _object({}),
    "required but not described": {"type": "object", "required": ["x"], "additionalProperties": INTEGER},
    "pattern properties": {"type": "object", "patternProperties": {"^n_": INTEGER}, "additionalProperties": False},
    "odd names": _object({"": INTEGER, 'a"b': INTEGER, "ä ö": BOOLEAN, "\\": {"type": "null"}}),
    "names that look like keywords": _object({"type": STRING, "properties": INTEGER, "$ref": BOOLEAN}),
    "nested objects": _object({"user": _object({"name": STRING, "address": _ADDRESS})}),
    "nested 20": _nested(20),
    "many properties": _object({f"p{index}": BOOLEAN for index in range(60)}),
    "array of objects": {"type": "array", "items": _object({"id": INTEGER, "ok": BOOLEAN}), "maxItems": 3},
    "any of": {"anyOf": [INTEGER, {"type": "string", "maxLength": 4}]},
    "any of objects": {"anyOf": [_object({"a": INTEGER}), _object({"b": STRING})]},
    "any of overlapping": {"anyOf": [{"type": "string", "maxLength": 2}, {"type": "string", "pattern": "^x+$"}]},
    "optional by any of": _object({"a": {"anyOf": [{"type": "null"}, INTEGER]}}),
    "one of disjoint": {"oneOf": [{"type": "string"}, {"type": "integer"}]},
    "one of by constant": {"oneOf": [_object({"k": {"const": "a"}, "v": INTEGER}), _object({"k": {"const": "b"}, "w": STRING})]},
    "all of": {
        "allOf": [
            {"type": "object", "properties": {"a": INTEGER}, "required": ["a"]},
            {"properties": {"b": BOOLEAN}, "required": ["b"]},
        ]
    },
    "all of one": {"allOf": [INTEGER]},
    "all of bounds": {"allOf": [{"type": "integer", "minimum": 3}, {"maximum": 8}]},
    "definitions": {"$defs": {"c": {"enum": ["x", "y"]}}, **_object({"a": {"$ref": "#/$defs/c"}, "b": {"$ref": "#/$defs/c"}})},
    "older definitions": {"definitions": {"c": INTEGER}, **_object({"a": {"$ref": "#/definitions/c"}})},
    "reference to a property": _object({"a": {"enum": ["x"]}, "b": {"$ref": "#/properties/a"}}),
    "tree": _TREE,
    "linked list": _LINKED,
    "expression": _EXPRESSION,
    "recursive root": {"type": "object", "properties": {"self": {"$ref": "#"}}, "additionalProperties": False},
    "mutual recursion": {
        "$ref": "#/$defs/a",
        "$defs": {
            "a": _object({"b": {"anyOf": [{"$ref": "#/$defs/b"}, {"type": "null"}]}}),
            "b": _object({"a": {"anyOf": [{"$ref": "#/$defs/a"}, {"type": "null"}]}}),
        },
    },
    "annotations": {"title": "T", "description": "d", "default": 3, "examples": [1], "$comment": "c", **INTEGER},
    "stated dialect": {"$schema": "https://json-schema.org/draft/2020-12/schema", **_object({"a": INTEGER})},
    "invoice": _object(
        {
            "number": {"type": "string", "pattern": "^INV-[0-9]{4}$"},
            "total": {"type": "number", "minimum": 0},
            "currency": {"enum": ["EUR", "USD"]},
            "lines": {
                "type": "array",
                "items": _object({"text": {"type": "string", "maxLength": 8}, "amount": NUMBER}),
                "maxItems": 2,
            },
            "paid": BOOLEAN,
        }
    ),
    "as pydantic writes it": {
        "title": "Answer",
        "type": "object",
        "properties": {
            "steps": {"items": {"$ref": "#/$defs/Step"}, "title": "Steps", "type": "array"},
            "answer": {"title": "Answer", "type": "string"},
        },
        "required": ["steps", "answer"],
        "additionalProperties": False,
        "$defs": {
            "Step": {
                "properties": {"text": {"title": "Text", "type": "string"}},
                "required": ["text"],
                "title": "Step",
                "type": "object",
                "additionalProperties": False,
            }
        },
    },
}

# Nothing can match these, or they say what cannot be enforced: they are refused.
WRONG: dict[str, Schema] = {
    "unknown type": {"type": "strnig"},
    "type is a number": {"type": 3},
    "contradictory types": {"allOf": [STRING, INTEGER]},
    "contradictory bounds": {"type": "integer", "minimum": 5, "maximum": 3},
    "no integer between": {"type": "integer", "exclusiveMinimum": 1, "exclusiveMaximum": 2},
    "lengths that cross": {"type": "string", "minLength": 5, "maxLength": 2},
    "empty enum": {"enum": []},
    "enum of another type": {"type": "integer", "enum": ["a"]},
    "not": {"not": STRING},
    "unique items": {"type": "array", "uniqueItems": True},
    "contains": {"type": "array", "contains": INTEGER},
    "if then": {"if": {"required": ["a"]}, "then": {"required": ["b"]}},
    "dependent": {"type": "object", "dependentRequired": {"a": ["b"]}},
    "property names": {"type": "object", "propertyNames": {"pattern": "^a"}},
    "one of that overlap": {"oneOf": [INTEGER, NUMBER]},
    "reference to nowhere": {"$ref": "#/$defs/absent"},
    "reference abroad": {"$ref": "https://example.com/schema.json"},
    "reference to a file": {"$ref": "file:///etc/passwd"},
    "reference to itself": {"$ref": "#"},
    "circle of references": {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}},
    "false for a required one": {"type": "object", "properties": {"a": False}, "required": ["a"]},
    "pattern that is none": {"type": "string", "pattern": "(["},
    "pattern with look-ahead": {"type": "string", "pattern": "^(?=a)b"},
    "pattern with a back reference": {"type": "string", "pattern": r"^(a)\1$"},
    "format that is none": {"type": "string", "format": "social-security-number"},
    "own white space": {"type": "object", "x-guidance": {"whitespace_pattern": " *", "lenient": True}, "not": {}},
    "names that overlap": {"type": "object", "patternProperties": {"^a": INTEGER, "^ab": STRING}},
}

# Work for the compiler or for each step: whatever comes of them comes soon, and an answer that ends is valid.
HOSTILE: dict[str, Schema] = {
    "all of any of": {"allOf": [{"anyOf": [{"properties": {f"p{i}{j}": STRING}} for j in range(6)]} for i in range(10)]},
    "doubling": {
        "$defs": {**{f"d{i}": {"allOf": [{"$ref": f"#/$defs/d{i + 1}"}] * 2} for i in range(12)}, "d12": {"type": "object"}},
        "$ref": "#/$defs/d0",
    },
    "doubling by any of": {
        "$defs": {**{f"d{i}": {"anyOf": [{"$ref": f"#/$defs/d{i + 1}"}] * 2} for i in range(12)}, "d12": {"enum": ["a"]}},
        "$ref": "#/$defs/d0",
    },
    "nested 60": _nested(28),
    "a billion items": {"type": "array", "items": INTEGER, "minItems": 10**9},
    "a billion characters": {"type": "string", "minLength": 10**9},
    "pattern of powers": {"type": "string", "pattern": "^((a{1,100}){1,100}){1,100}$"},
    "pattern of (a+)+": {"type": "string", "pattern": "^(a+)+$"},
    "pattern far from the end": {"type": "string", "pattern": "^(a|b)*a(a|b){300}$"},
    "many alternatives": {"type": "string", "pattern": "^(" + "|".join(f"w{index}x" for index in range(2000)) + ")$"},
    "enum of 3000": {"enum": [f"v{index}" for index in range(3000)]},
    "1000 properties": _object({f"property {index}": STRING for index in range(1000)}, []),
    "large factor": {"type": "integer", "multipleOf": 9973},
    "recursion without end": {"$ref": "#/$defs/a", "$defs": {"a": _object({"a": {"$ref": "#/$defs/a"}})}},
    "tiny factor": {"type": "number", "multipleOf": 1e-12},
    "huge bounds": {"type": "number", "minimum": -1e308, "maximum": 1e308},
    "bounds past 64 bits": {"type": "integer", "minimum": -(10**30), "maximum": 10**30},
    "names of all kinds": _object({chr(index): BOOLEAN for index in range(32, 300)}, []),
}

# Takes the compiler half a minute.
ENDLESS_WORK: Schema = {"type": "integer", "multipleOf": 999_983}
