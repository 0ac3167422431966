"""Messages, tools and formats of the OpenAI chat API as core messages. Pure."""

from __future__ import annotations

from typing import Final

from caravan.core.v1 import chat_pb2, generation_pb2
from caravan.engine.v1 import engine_service_pb2 as engine_pb

from services.gateway import images, rules
from services.gateway import openai_schema as schema
from services.gateway.openai_fields import unsupported
from services.gateway.rules import invalid
from services.runtime.errors import CaravanError

_ANY_OBJECT: Final = "{}"
_MODES: Final = {
    "auto": chat_pb2.ToolChoice.MODE_AUTO,
    "none": chat_pb2.ToolChoice.MODE_NONE,
    "required": chat_pb2.ToolChoice.MODE_REQUIRED,
}


def add_chat(given: schema.ChatCompletion, generate: engine_pb.GenerateRequest) -> None:
    """Sets the chat, its tools and the grammar of its answer."""
    if not given.messages:
        raise invalid("messages", "it is empty.")
    # Set even where all its fields have their defaults: it says which kind of prompt this is.
    generate.chat.SetInParent()
    for index, message in enumerate(given.messages):
        _add_message(message, generate.chat.messages.add(), f"messages[{index}]")
    _add_tools(given.tools or [], generate.chat)
    _set_format(given.response_format, generate.sampling)
    if given.tool_choice is not None:
        _set_choice(given.tool_choice, generate.chat.tool_choice)
    rules.check_tool_choice(generate.chat, generate.sampling.HasField("grammar"), _same_name)


def _same_name(name: str) -> str:
    return name


def _add_message(given: schema.Message, message: chat_pb2.ChatMessage, at: str) -> None:
    if isinstance(given, schema.FunctionMessage):
        raise unsupported(f"{at}.role", "The role 'function' was replaced by 'tool'.")
    if isinstance(given, schema.AssistantMessage):
        _add_assistant(given, message, at)
        return
    if isinstance(given, schema.UserMessage):
        message.role = chat_pb2.ROLE_USER
        message.name = given.name or ""
        _add_content(given.content, message, f"{at}.content")
        return
    message.content = _text(given.content, f"{at}.content")
    if isinstance(given, schema.ToolMessage):
        message.role = chat_pb2.ROLE_TOOL
        if not given.tool_call_id:
            raise invalid(f"{at}.tool_call_id", "it is empty.")
        message.tool_call_id = given.tool_call_id
        return
    message.role = chat_pb2.ROLE_SYSTEM
    message.name = given.name or ""


def _add_assistant(given: schema.AssistantMessage, message: chat_pb2.ChatMessage, at: str) -> None:
    message.role = chat_pb2.ROLE_ASSISTANT
    message.name = given.name or ""
    for name in ("audio", "function_call", "annotations"):
        if getattr(given, name) not in (None, [], ""):
            raise unsupported(f"{at}.{name}", "Only the text and the tool calls are used.")
    if given.content is None:
        if not given.tool_calls and not given.refusal:
            raise CaravanError(
                "MISSING_FIELD",
                f"Missing required parameter: '{at}.content'.",
                param=f"{at}.content",
            )
    else:
        message.content = _text(given.content, f"{at}.content", said_by_model=True)
    # Models have one voice: why they did not answer is what they said.
    message.content += given.refusal or ""
    for index, call in enumerate(given.tool_calls or []):
        where = f"{at}.tool_calls[{index}]"
        if isinstance(call, schema.CustomToolCall):
            raise unsupported(f"{where}.type", "Tools are functions.")
        rules.check_function_name(call.function.name, f"{where}.function.name")
        arguments = call.function.arguments or _ANY_OBJECT
        rules.check_depth(
            rules.check_json_object(arguments, f"{where}.function.arguments"),
            f"{where}.function.arguments",
        )
        message.tool_calls.add(id=call.id, name=call.function.name, arguments_json=arguments)


def _add_content(content: schema.Content, message: chat_pb2.ChatMessage, at: str) -> None:
    """What the user says: a text, or parts in their order where there is an image among them."""
    if isinstance(content, str) or not any(isinstance(p, schema.ImagePart) for p in content):
        message.content = _text(content, at)
        return
    images.check_count(len(content), at)
    for index, part in enumerate(content):
        where = f"{at}[{index}]"
        if isinstance(part, schema.TextPart):
            message.parts.add(text=part.text)
        elif isinstance(part, schema.ImagePart):
            image = message.parts.add().image
            image_url = part.image_url
            images.add_from_openai(image_url.url, image_url.detail, image, f"{where}.image_url")
        else:
            raise unsupported(
                f"{where}.type", "Users send parts of the types 'text' and 'image_url'."
            )


def _text(content: schema.Content, at: str, *, said_by_model: bool = False) -> str:
    if isinstance(content, str):
        return content
    if not content:
        raise invalid(at, "it is empty.")
    texts = []
    for index, part in enumerate(content):
        if isinstance(part, schema.TextPart):
            texts.append(part.text)
        elif isinstance(part, schema.RefusalPart) and said_by_model:
            texts.append(part.refusal)
        else:
            raise unsupported(f"{at}[{index}].type", "Only parts of the type 'text' are.")
    return "".join(texts)


def _add_tools(given: list[schema.Tool], chat: chat_pb2.ChatPrompt) -> None:
    for index, tool in enumerate(given):
        at = f"tools[{index}]"
        if isinstance(tool, schema.CustomTool):
            raise unsupported(f"{at}.type", "Tools are functions.")
        function = tool.function
        if function.strict:
            raise unsupported(
                f"{at}.function.strict", "Arguments are not forced to follow their schema."
            )
        parameters = ""
        if function.parameters is not None:
            parameters = rules.schema_text(function.parameters, f"{at}.function.parameters")
        chat.tools.add(
            name=function.name,
            description=function.description or "",
            parameters_json=parameters,
        )
    rules.check_tool_names(
        [tool.name for tool in chat.tools], lambda index: f"tools[{index}].function.name", "tools"
    )


def _set_choice(
    given: str | schema.NamedChoice | schema.CustomChoice | schema.AllowedChoice,
    choice: chat_pb2.ToolChoice,
) -> None:
    if isinstance(given, str):
        if given not in _MODES:
            raise invalid("tool_choice", "a text must be 'none', 'auto' or 'required'.")
        choice.mode = _MODES[given]
    elif isinstance(given, schema.NamedChoice):
        choice.mode = chat_pb2.ToolChoice.MODE_NAMED
        choice.name = given.function.name
    else:
        raise unsupported("tool_choice.type", "Only 'function' is.")


def _set_format(
    given: schema.TextFormat | schema.JsonObjectFormat | schema.JsonSchemaFormat | None,
    sampling: generation_pb2.Sampling,
) -> None:
    if isinstance(given, schema.JsonObjectFormat):
        sampling.grammar.json_schema = _ANY_OBJECT
    elif isinstance(given, schema.JsonSchemaFormat):
        at = "response_format.json_schema"
        rules.check_function_name(given.json_schema.name, f"{at}.name")
        sampling.grammar.json_schema = rules.schema_text(given.json_schema.schema, f"{at}.schema")
