"""A teacher's samples on disk: conditionings, index, reader, writer."""
