"""What is no part of the lesson: files, pictures, tables, processes."""
