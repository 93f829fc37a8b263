"""Options, inputs and outputs that several verbs share."""
