"""What a recipe may say (`schema`), and how one is read (`load`); packaged recipes lie in `recipes/`."""
