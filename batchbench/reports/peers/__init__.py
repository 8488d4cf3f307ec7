"""Result files of other benchmark tools: readers, and the writer of llm-d's benchmark report."""
