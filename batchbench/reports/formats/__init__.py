"""One file a format; each turns a Result into something that people or programs read."""
