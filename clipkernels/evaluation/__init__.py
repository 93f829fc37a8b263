"""Accuracy of dense and reduced towers on labelled data sets, by method, head and shots, beside published figures."""
