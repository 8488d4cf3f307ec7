"""The studies: each runs experiments to answer one question, such as a sweep or a ladder."""
