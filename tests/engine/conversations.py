"""Conversations of several shapes, tools and documents, for templates."""


def message(role, content, **more):
    return {"role": role, "content": content, **more}


def call(name, arguments, **more):
    function = {"name": name, "arguments": arguments}
    return {"type": "function", "function": function, **more}


ASKED = message("user", "  What is <b>2 & 2</b>?\n")
SYSTEM = message("system", "Answer in 日本語 – 'quoted' \"twice\" ✓")
CALLED = message(
    "assistant", "", tool_calls=[call("add", {"b": 2, "a": "ü<1>"}, id="abcdefghi")]
)
TWO_CALLS = {
    "role": "assistant",
    "content": None,
    "tool_calls": [call("add", {"b": 2, "a": [1.5, None, True]}, id="123456789")] * 2,
}
RESULT = message("tool", '{"sum": "4 & <more>"}', name="add")
THOUGHT = "<think>\nlet me see\n</think>\n\nIt is 4. 😀"
CONVERSATIONS = {
    "question": [ASKED],
    "system": [SYSTEM, ASKED],
    "several": [ASKED, message("assistant", THOUGHT), message("user", "नम Why?")],
    "all": [SYSTEM, ASKED, message("assistant", " 4 "), message("user", "")],
    "answered": [ASKED, message("assistant", "{{ bos_token }} 4")],
    "thoughts": [ASKED, message("assistant", "4", reasoning_content="two\ntwos")],
    "other thoughts": [ASKED, message("assistant", "4", reasoning="and 2")],
    "tool": [ASKED, CALLED, RESULT],
    "two calls": [ASKED, TWO_CALLS, RESULT, RESULT, message("assistant", "done")],
    "parts": [message("user", [{"type": "text", "text": "a <i>"}, {"type": "image"}])],
    "wrong order": [message("assistant", "first"), ASKED],
    "other role": [ASKED, message("critic", "no")],
}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": name,
            "description": 'Adds "a" & <b> – größer',
            "parameters": {
                "type": "object",
                "properties": {"b": {"type": "number"}, "a": {"type": "string"}},
                "required": ["b", "a"],
            },
        },
    }
    for name in ("add", "subtract")
]
DOCUMENTS = [{"title": "Zoë's <notes>", "text": "b\na"}]
