"""The tools of the demo: their schemas in several wordings."""

import random
from dataclasses import dataclass
from typing import Any

Schema = dict[str, Any]


@dataclass(frozen=True)
class Parameter:
    """One argument: its name as the server declares it, JSON type and descriptions."""

    name: str
    kind: str
    texts: tuple[str, ...]


@dataclass(frozen=True)
class Tool:
    """A function with the names and descriptions under which servers may declare it."""

    id: str
    names: tuple[str, ...]
    texts: tuple[str, ...]
    parameters: tuple[Parameter, ...]


TOOLS = (
    Tool("weather", ("get_weather", "get_current_weather", "weather"),
         ("Get the weather in a city.", "Current weather of a city", "Weather", "Get current weather",
          "Get the current weather for a city"),
         (Parameter("city", "string", ("The city", "Name of the city", "City")),
          Parameter("day", "string", ("The day", "Day of the forecast")))),
    Tool("time", ("get_time", "get_current_time"),
         ("Get the time in a city.", "Current time in a city", "Time", "Local time of a city"),
         (Parameter("city", "string", ("The city", "Name of the city", "City")),)),
    Tool("add", ("add", "sum", "add_numbers"),
         ("Add two numbers.", "Adds a and b", "Sum of two numbers"),
         (Parameter("a", "integer", ("First number", "The first number")),
          Parameter("b", "integer", ("Second number", "The second number")))),
    Tool("multiply", ("multiply", "multiply_numbers"),
         ("Multiply two numbers.", "Multiplies a and b", "Product of two numbers"),
         (Parameter("a", "integer", ("First number", "The first number")),
          Parameter("b", "integer", ("Second number", "The second number")))),
    Tool("search", ("search", "search_web", "web_search"),
         ("Search the web.", "Search for a text", "Web search"),
         (Parameter("query", "string", ("The query", "What to search for", "Search text")),)),
    Tool("message", ("send_message", "send_text"),
         ("Send a message to a person.", "Send a message", "Sends a text message"),
         (Parameter("to", "string", ("Who gets it", "The receiver", "Name of the person")),
          Parameter("text", "string", ("The text", "What to say")))),
    Tool("alarm", ("set_alarm",),
         ("Set an alarm.", "Sets an alarm clock", "Alarm at a time"),
         (Parameter("time", "string", ("The time", "Time as HH:MM")),)),
    Tool("price", ("get_price", "price"),
         ("Get the price of an item.", "Price of an item", "Look up a price"),
         (Parameter("item", "string", ("The item", "Name of the item")),)),
    Tool("light", ("set_light", "switch_light"),
         ("Turn a light on or off.", "Switch the light in a room", "Controls a light"),
         (Parameter("room", "string", ("The room", "Name of the room")),
          Parameter("state", "string", ("on or off",)))),
)  # fmt: skip
TOOL_BY_ID = {tool.id: tool for tool in TOOLS}


@dataclass(frozen=True)
class Listed:
    """A tool as one dialogue lists it; `renamed` maps our argument names to the listed ones."""

    id: str
    name: str
    arguments: tuple[str, ...]
    schema: Schema
    renamed: dict[str, str]


def declare(rng: random.Random, tool: Tool) -> Listed:
    """One wording of the tool: name, descriptions, optional parts and order of keys."""
    name = tool.names[0] if rng.random() < 0.6 else rng.choice(tool.names)
    parameters = tool.parameters
    if tool.id == "weather" and rng.random() < 0.6:
        parameters = parameters[:1]
    renamed = {"city": "location"} if rng.random() < 0.2 else {}
    describe = rng.random() < 0.6
    properties: Schema = {}
    for parameter in parameters:
        declared: Schema = {"type": parameter.kind}
        if describe:
            declared["description"] = rng.choice(parameter.texts)
        properties[renamed.get(parameter.name, parameter.name)] = declared
    shape: Schema = {"type": "object", "properties": properties}
    if rng.random() < 0.8:
        names = (item.name for item in parameters if item.name != "day")
        shape["required"] = [renamed.get(name, name) for name in names]
    function: Schema = {"name": name}
    if rng.random() < 0.9:
        function["description"] = rng.choice(tool.texts)
    function["parameters"] = shape
    schema: Schema = {"type": "function", "function": function}
    if rng.random() < 0.15:
        schema = _shuffled(rng, schema)
    arguments = tuple(item.name for item in parameters)
    return Listed(tool.id, name, arguments, schema, renamed)


def _shuffled(rng: random.Random, value: Schema) -> Schema:
    """The keys of a schema in another order, but the arguments in their own."""
    keys = list(value)
    if (
        "city" not in keys
        and "location" not in keys
        and "a" not in keys
        and "to" not in keys
        and "room" not in keys
    ):
        rng.shuffle(keys)
    return {key: _shuffled(rng, item) if isinstance(item := value[key], dict) else item
            for key in keys}  # fmt: skip


def list_tools(rng: random.Random, ids: tuple[str, ...] = ()) -> tuple[Listed, ...]:
    """One to three tools in random order, among them those named."""
    count = max(len(ids), rng.choice((1, 1, 2, 2, 3)))
    others = [tool.id for tool in TOOLS if tool.id not in ids]
    chosen = list(ids) + rng.sample(others, count - len(ids))
    rng.shuffle(chosen)
    return tuple(declare(rng, TOOL_BY_ID[id_]) for id_ in chosen)
