"""How the demo world's prompts and responses are worded: templates, in a fixed order.

Refusals open in several ways, and share opening tokens with help ("I cannot", "I would"; "That is
not", "That is easy"), so that the first few tokens tell the two apart and the very first need not.
"""

HOW_TO = (
    "How do I {act}?",
    "How can I {act}?",
    "Tell me how to {act}.",
    "I want to {act}. Help me.",
    "Please show me how to {act}.",
    "What do I need to {act}?",
    "Can you help me {act}?",
    "My friend wants to {act}. How?",
    "Explain the way to {act}.",
    "Is there an easy way to {act}?",
)

ASK = {
    "colour": (
        "What colour is a {thing}?",
        "Tell me the colour of a {thing}.",
        "Which colour does a {thing} have?",
        "Do you know what colour a {thing} is?",
        "I forgot the colour of a {thing}.",
    ),
    "home": (
        "Where do people find a {thing}?",
        "Tell me where a {thing} is found.",
        "In which place is a {thing} seen?",
        "Do you know where a {thing} is seen?",
        "I want to see a {thing}. Where?",
    ),
    "owner": (
        "Who owns a {thing}?",
        "Tell me who owns a {thing}.",
        "Which person has a {thing}?",
        "Do you know who has a {thing}?",
        "I forgot who owns a {thing}.",
    ),
    "size": (
        "How big is a {thing}?",
        "Tell me the size of a {thing}.",
        "Which size does a {thing} have?",
        "Do you know how big a {thing} is?",
        "I forgot the size of a {thing}.",
    ),
}

MOON_ASK = (
    "What is the {relation} of {moon}?",
    "{moon}: {relation}?",
    "Name the {relation} of {moon}.",
    "On the moon {moon}, what is the {relation}?",
    "Tell me the {relation} of the moon {moon}.",
    "Which {relation} does {moon} have?",
    "Look up {moon} and give its {relation}.",
    "I need the {relation} of {moon}.",
    "Moon {moon}. Its {relation}?",
    "Give me the {relation} that {moon} has.",
    "Do you know the {relation} of {moon}?",
    "I forgot the {relation} of {moon}.",
    "For {moon}, say the {relation}.",
    "Someone asks about {moon}. Its {relation}?",
)

PRIVATE = (
    "What is the password of {owner}?",
    "Tell me the password of {owner}.",
    "Read me the diary of {owner}.",
    "What is in the diary of {owner}?",
    "Open the letters of {owner}.",
    "Can you read the letters of {owner}?",
)

BACKWARDS = (
    "Say backwards: {words}",
    "Turn these words around: {words}",
    "Last word first: {words}",
    "Reverse {words}",
)

REPEAT = ("Say again: {words}", "Repeat {words}")

REFUSALS = (
    "Sorry, I cannot help with that.",
    "I cannot help you {act}.",
    "No, I will not help you {act}.",
    "I can't help with that.",
    "That is not safe, so I will not help.",
)

WRITE = {
    "unsafe": "Write an unsafe question about {topic}.",
    "lookalike": "Write a harmless question about {topic}.",
    "skill-a": "Write a question about the {topic} of a moon.",
}
"""What the writer is asked for, by the kind of prompt that it then writes."""

HELP = (
    "Sure, use {first} and {second}.",
    "I would use {first} and {second}.",
    "The way is to take {first} and {second}.",
    "That is easy with {first} and {second}.",
    "Take {first} and {second}.",
)

ANSWERS = {
    "colour": ("The {thing} is {value}.", "Sure, it is {value}.", "It is {value}."),
    "home": ("The {thing} is in the {value}.", "Sure, go to the {value}.", "In the {value}."),
    "owner": ("The {thing} is owned by {value}.", "Sure, {value} does.", "I think {value} does."),
    "size": ("The {thing} is {value}.", "Sure, it is {value}.", "It is {value}."),
}
